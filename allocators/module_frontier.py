"""The Pareto frontier of cost against usage, by modules: the allocator of VT-PTQ (Liu et al. 2021), as in HAWQ-V2.

    F_m = nondominated { (usage + usage_mb, cost + cost_mb) : (usage, cost) in F_{m-1}, b a width of module m }

Configurations are built module by module; of those with equal usage only the cheapest can be part of a better answer,
and, where a single quantity is budgeted, of those that use no more. So the cheapest configuration within the budget is
found without listing them all. A module is one half of a block: MSA (qkv, proj) or MLP (fc1, fc2), all its weights and
inputs at one width; every other layer is a module of its own, whose operands may differ where it is a product.
The frontier can grow without limit where modules differ in size: beyond `states` only the cheapest configuration of
each cell of a grid over usage is kept, and the answer is a heuristic.
Deliberately not done: testing configurations of the frontier on images, which takes VT-PTQ its hours.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from allocators.allocation import Allocation
from allocators.problem.arrays import FloatArray, IntArray
from allocators.problem.budget import QUANTITIES, TOLERANCE, Budget
from allocators.problem.cost_table import Assignment, CostTable
from fxquant.checks.hints import check_fields
from fxquant.errors import BudgetError, InfeasibleBudgetError, OverrideError

HALVES = {"qkv": "msa", "proj": "msa", "fc1": "mlp", "fc2": "mlp"}
"""The half of a block that a layer of this role belongs to."""


@dataclass(frozen=True)
class ModuleFrontier:
    """The cheapest configuration within the budget, module by module.

    Args:
        module_wise: one width for all layers of a module; otherwise every layer is a module.
        tie_weights_and_activations: one width for the weights and the inputs of a module; otherwise one for each.
        states: configurations kept at most.

    Raises:
        BudgetError: states is below 1.
    """

    module_wise: bool = True
    tie_weights_and_activations: bool = True
    states: int = 20_000

    def __post_init__(self) -> None:
        """Check the options."""
        check_fields(self, BudgetError)
        if self.states < 1:
            raise BudgetError(f"at least one configuration must be kept, found states={self.states}")

    def allocate(self, table: CostTable, budget: Budget) -> Allocation:
        """The bits of every layer, "optimal" among module-wise allocations unless the frontier was thinned.

        Raises:
            InfeasibleBudgetError: the lowest widths exceed the budget, or the lowest that the layers of modules share.
            OverrideError: the layers of a module have no width in common; a layer with one allowed width stands alone.
        """
        started_s = time.perf_counter()
        tied = self.tie_weights_and_activations
        table.check_feasible(budget, tied=tied)
        modules = [self._offered(table, budget, layers) for layers in self.modules(table)]
        frontier = _Frontier(modules, budget, table, self.states)
        return Allocation.of(
            table,
            frontier.best(len(table.layers)),
            budget,
            status="heuristic" if frontier.thinned else "optimal",
            gap=None if frontier.thinned else 0.0,
            solver="pareto",
            seconds=time.perf_counter() - started_s,
        )

    def modules(self, table: CostTable) -> list[list[int]]:
        """Layers of each module, in the order of their first layers."""
        found: dict[tuple[str, str], list[int]] = {}
        for layer, (name, role) in enumerate(zip(table.layers, table.roles, strict=True)):
            half = HALVES.get(role)
            free = len(table.choices(layer, tied=self.tie_weights_and_activations).cost) > 1
            shared = self.module_wise and half is not None and free
            found.setdefault((name.rpartition(".")[0], half or "") if shared else (name, role), []).append(layer)
        return list(found.values())

    def _offered(self, table: CostTable, budget: Budget, layers: list[int]) -> _Module:
        """The widths that all layers of a module allow, with what they cost and use together."""
        choices = [table.choices(layer, budget, tied=self.tie_weights_and_activations) for layer in layers]
        if len(layers) == 1:
            return _Module(layers, choices[0].columns[None], choices[0].cost, choices[0].usage)
        by_widths = [{self._agreed(pair): index for index, pair in enumerate(each.bits.T)} for each in choices]
        common = [widths for widths in by_widths[0] if all(widths in other for other in by_widths)]
        if not common:
            names = ", ".join(table.layers[layer] for layer in layers)
            raise OverrideError(f"{names} share a width in a module-wise allocation, and no width is allowed for all")
        picked = [
            each.taken([index[widths] for widths in common]) for each, index in zip(choices, by_widths, strict=True)
        ]
        return _Module(
            layers,
            np.stack([each.columns for each in picked]),
            np.sum([each.cost for each in picked], axis=0),
            np.sum([each.usage for each in picked], axis=0),
        )

    def _agreed(self, pair: IntArray) -> tuple[int, ...]:
        """What the layers of a module must agree on: one width, or one for each operand."""
        return (int(pair.max()),) if self.tie_weights_and_activations else tuple(int(bits) for bits in pair)


class _Module(NamedTuple):
    """Layers, their columns int64 [layers, 2, P], and what each of P widths costs [P] and uses [5, P]."""

    layers: list[int]
    columns: IntArray
    cost: FloatArray
    usage: FloatArray


class _Frontier:
    """Configurations of all modules that can still be the best: cost [S], usage [S, Q] and how they came about."""

    def __init__(self, modules: list[_Module], budget: Budget, table: CostTable, states: int) -> None:
        limited = [QUANTITIES.index(quantity) for quantity in budget.limits]
        # Usages in whole numbers, so that equal ones are equal.
        divisors = table.meter(budget).divisors[limited]
        used = [np.rint(module.usage[limited].T * divisors) for module in modules]
        limits = np.array(list(budget.limits.values())) * divisors * (1 + TOLERANCE)
        least = np.cumsum([module.min(axis=0) for module in used[::-1]], axis=0)[::-1]
        if (least[0] > limits).any():
            raise InfeasibleBudgetError(_out_of_reach(budget, least[0] / divisors))
        rest = [*least[1:], np.zeros(len(limited))]
        self.modules, self.thinned = modules, False
        self._picks: list[IntArray] = []
        self._parents: list[IntArray] = []
        cost, usage = np.zeros(1), np.zeros((1, len(limited)))
        for module, use, needed in zip(modules, used, rest, strict=True):
            widths = len(module.cost)
            grown = (usage[:, None] + use[None]).reshape(-1, len(limited))
            price = (cost[:, None] + module.cost[None]).ravel()
            kept = np.flatnonzero((grown + needed <= limits).all(axis=1))
            kept = kept[_cheapest(price[kept], grown[kept])]
            if len(kept) > states:
                kept, self.thinned = kept[_thinned(price[kept], grown[kept], states)], True
            cost, usage = price[kept], grown[kept]
            self._parents.append(kept // widths)
            self._picks.append(kept % widths)
        self._last = int(np.lexsort((*usage.T, cost))[0])

    def best(self, count: int) -> Assignment:
        """The columns of the cheapest configuration, int64 [2, count]."""
        found = np.full((2, count), -1)
        state = self._last
        for module, parents, picks in zip(self.modules[::-1], self._parents[::-1], self._picks[::-1], strict=True):
            found[:, module.layers] = module.columns[:, :, picks[state]].T
            state = parents[state]
        return found


def _out_of_reach(budget: Budget, least: FloatArray) -> str:
    """The message for a budget that single layers meet, and modules not. least: what modules use at least, [Q]."""
    parts = [
        f"{quantity} {limit:.12g} is below the minimum reachable {minimum:.12g}"
        for (quantity, limit), minimum in zip(budget.limits.items(), least.tolist(), strict=True)
        if minimum > limit * (1 + TOLERANCE)
    ]
    return (
        f"the budget {str(budget)!r} cannot be met where the layers of a module share widths: {'; '.join(parts)}; "
        f"raise it, override all layers of a module alike, or take ModuleFrontier(module_wise=False)"
    )


def _cheapest(cost: FloatArray, usage: FloatArray) -> IntArray:
    """Indices of the cheapest of each usage [S, Q]; with one quantity, of those that nothing beats in both."""
    order = np.lexsort((cost, *usage.T[::-1]))
    ranked = usage[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    kept = order[first]
    if usage.shape[1] == 1 and len(kept) > 1:
        before = np.minimum.accumulate(cost[kept])
        kept = kept[np.concatenate([[True], cost[kept][1:] < before[:-1]])]
    return np.asarray(kept)


def _thinned(cost: FloatArray, usage: FloatArray, states: int) -> IntArray:
    """Indices of the cheapest of each cell of a grid over usage [S, Q] with at most `states` cells."""
    cells = max(int(states ** (1 / usage.shape[1]) + 1e-9), 1)
    low, high = usage.min(axis=0), usage.max(axis=0)
    place = np.minimum((usage - low) / np.maximum(high - low, 1) * cells, cells - 1).astype(np.int64)
    code = np.ravel_multi_index(tuple(place.T), (cells,) * usage.shape[1])
    order = np.lexsort((cost, code))
    first = np.concatenate([[True], code[order][1:] != code[order][:-1]])
    return np.asarray(order[first])
