"""The optimal allocation by integer programming: one binary variable per layer and pair of widths of its operands.

    minimise  sum_lp cost_lp x_lp
    so that   sum_p x_lp = 1 for every layer l,    sum_lp usage_qlp x_lp <= budget_q for every budgeted quantity q

LampQ's integer program ("Iterative bit update"), in one-hot form. Pairs of widths keep bit operations linear.
What the solver sees is small and well scaled: costs count from each layer's minimum in units of the start's excess,
usage from each layer's minimum in units of the headroom; a pair that alone exceeds either, or that another pair beats
in every respect, is left out. Without a budget of bit operations or latency, and untied, nothing couples a layer's
operands: then each gets its own one-hot, 2 C variables a layer instead of C^2.
Deliberately not done: interactions between layers (a quadratic objective).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import mip
import numpy as np

from allocators.allocation import Allocation
from allocators.greedy import Greedy
from allocators.problem.arrays import BoolArray, FloatArray, IntArray
from allocators.problem.budget import QUANTITIES, TOLERANCE, Budget
from allocators.problem.cost_table import Assignment, CostTable
from allocators.problem.operands import Choices
from allocators.swaps import Swaps
from fxquant.checks.arguments import whole
from fxquant.checks.hints import check_fields
from fxquant.errors import BudgetError

_NEGLIGIBLE: Final = 1e-12
"""A scaled coefficient below this is written as zero."""

_RUNS: Final = 8
"""How often the solver runs at most."""

_SLIP: Final = 2e-6
"""What the headroom loses when the solver's answer slips over the budget."""

_OBJECTIVE_SCALE: Final = 1e3
"""What the excess counts for in the solver's objective: CBC passes over improvements below 1e-5."""

_SOLVER_TOLERANCE: Final = 1e-9
"""Feasibility, optimality and integrality tolerances of the solver, in scaled units."""


@dataclass(frozen=True)
class Milp:
    """Bits that minimise the summed cost within a budget, by CBC through python-mip; never worse than `Greedy`.

    Args:
        time_limit_s: wall time given to the solver, s; the best answer so far is returned when it runs out. What that
            is depends on how busy the machine is, so `node_limit` is meant to end the search first.
        relative_gap: stop when the objective is proven within this fraction of the optimum; costs are estimates, so
            the default is far below their own error.
        tie_weights_and_activations: give a layer's weight and its input the same bits.
        threads: solver threads; more than one may make the choice among equal optima vary.
        seed: the solver's seed.
        node_limit: nodes of the search tree in each run of the solver; a few seconds of work for the table
            of a ViT, and the same answer on every machine.

    Raises:
        BudgetError: an option is out of range.
    """

    time_limit_s: float = 120.0
    relative_gap: float = 1e-4
    tie_weights_and_activations: bool = False
    threads: int = 1
    seed: int = 0
    node_limit: int = 20_000

    def __post_init__(self) -> None:
        """Check the options."""
        check_fields(self, BudgetError)
        if not self.time_limit_s > 0 or not 0 <= self.relative_gap < 1 or self.threads < 1:
            raise BudgetError(
                f"time_limit_s must be above 0, relative_gap at least 0 and below 1, threads at least 1; found {self}"
            )
        whole("seed", self.seed, BudgetError, least=0, most=2**31 - 1)
        whole("threads", self.threads, BudgetError, most=1024)
        whole("node_limit", self.node_limit, BudgetError, least=1, most=2**31 - 1)

    def allocate(self, table: CostTable, budget: Budget) -> Allocation:
        """The best bits of every layer, "optimal" when proven within `relative_gap`, else "feasible".

        CBC reports its answer as its bound once it stops within `relative_gap`, so a gap of 0 means "within it".

        Raises:
            InfeasibleBudgetError: no allocation meets the budget (known exactly, before solving).
            OverrideError: operands are tied and a layer has no common width.
        """
        started_s = time.perf_counter()
        table.check_feasible(budget, tied=self.tie_weights_and_activations)
        best = self._start(table, budget)
        best, bound = self._improve(table, budget, best, started_s)
        objective = table.objective(best)
        gap = max(0.0, objective - bound) / objective if objective > 0 else 0.0
        return Allocation.of(
            table,
            best,
            budget,
            status="optimal" if gap <= self.relative_gap else "feasible",
            gap=gap,
            solver="milp-cbc",
            seconds=time.perf_counter() - started_s,
        )

    def _start(self, table: CostTable, budget: Budget) -> Assignment:
        """The best assignment known before solving: of the cheapest rule, tied if need be."""
        candidates = [Swaps().assign(table, budget), Greedy(minimum_bits=1).assign(table, budget)]
        if self.tie_weights_and_activations:
            candidates = [_tied(table, assignment) for assignment in candidates] + [table.lowest(tied=True)]
        feasible = [assignment for assignment in candidates if not budget.exceeded(table.usage(assignment, budget))]
        return min(feasible, key=table.objective)

    def _improve(
        self, table: CostTable, budget: Budget, best: Assignment, started_s: float
    ) -> tuple[Assignment, float]:
        """The solver's assignment where it beats `best`, and a lower bound on every objective.

        The solver's tolerances are absolute, so it runs again in finer units while its answer more than halves the
        excess, and with less headroom when rounding let its answer slip over the budget.
        """
        headroom = 1.0
        bound = 0.0
        for _ in range(_RUNS):
            program = _Program.of(table, budget, best, tied=self.tie_weights_and_activations)
            bound = max(bound, program.floor)
            remaining_s = self.time_limit_s - (time.perf_counter() - started_s)
            if program.excess <= self.relative_gap * table.objective(best) or remaining_s <= 0:
                break
            found, proven = self._solve(program, headroom, remaining_s)
            if headroom == 1.0:
                bound = max(bound, program.floor + program.excess * proven)
            if found is None:
                break
            if budget.exceeded(table.usage(found, budget)):
                headroom -= _SLIP
                continue
            best = min(best, found, key=table.objective)
            if table.objective(best) - program.floor > program.excess / 2:
                break
        return best, bound

    def _solve(self, program: _Program, headroom: float, seconds: float) -> tuple[Assignment | None, float]:
        """One run of the solver: the columns it found, if any, and its bound in scaled units."""
        model = mip.Model(sense=mip.MINIMIZE, solver_name=mip.CBC)
        model.verbose = 0
        model.threads = self.threads
        model.seed = self.seed
        model.infeas_tol = model.opt_tol = model.integer_tol = _SOLVER_TOLERANCE
        model.max_mip_gap = self.relative_gap
        model.max_mip_gap_abs = max(1e-10, _OBJECTIVE_SCALE * self.relative_gap * program.floor / program.excess)
        picks = [[model.add_var(var_type=mip.BINARY) for _ in layer.cost] for layer in program.layers]
        for row in picks:
            model += mip.xsum(row) == 1
        for quantity in range(program.layers[0].usage.shape[0]):
            usage = (layer.usage[quantity] for layer in program.layers)
            model += _weighted(picks, usage) <= headroom
        model.objective = _weighted(picks, (_OBJECTIVE_SCALE * layer.cost for layer in program.layers))
        model.start = [(row[layer.start], 1.0) for row, layer in zip(picks, program.layers, strict=True)]
        status = model.optimize(max_seconds=seconds, max_nodes=self.node_limit)
        if status not in (mip.OptimizationStatus.OPTIMAL, mip.OptimizationStatus.FEASIBLE):
            return None, 0.0
        chosen = [int(np.argmax([pick.x for pick in row])) for row in picks]
        found = np.full((2, program.layers[-1].layer + 1), -1)
        for layer, index in zip(program.layers, chosen, strict=True):
            found[layer.rows, layer.layer] = layer.columns[layer.rows, index]
        return found, float(model.objective_bound) / _OBJECTIVE_SCALE


class _Layer(NamedTuple):
    """The pairs of one layer, or the widths of one of its operands, that can be part of a better answer.

    Args:
        layer: its index.
        rows: the rows of an assignment it decides: both operands, or one.
        columns: int64 [2, P].
        cost: float64 [P], scaled.
        usage: float64 [Q, P], scaled; Q budgeted quantities.
        start: the pair that stands for the known answer.
    """

    layer: int
    rows: slice
    columns: IntArray
    cost: FloatArray
    usage: FloatArray
    start: int


class _Program(NamedTuple):
    """The scaled integer program: objective = floor + excess * scaled objective.

    Args:
        floor: sum of each layer's least cost.
        excess: the known answer's objective above the floor.
        layers: one entry per layer.
    """

    floor: float
    excess: float
    layers: list[_Layer]

    @classmethod
    def of(cls, table: CostTable, budget: Budget, known: Assignment, *, tied: bool) -> _Program:
        """The program that asks for anything better than `known`."""
        separable = not tied and budget.bit_operations is None and budget.latency_ms is None
        parts = (slice(0, 1), slice(1, 2)) if separable else (slice(0, 2),)
        choices = [
            (layer, rows, _part(table, budget, layer, rows) if separable else table.choices(layer, budget, tied=tied))
            for layer in range(len(table.layers))
            for rows in parts
        ]
        limited = [QUANTITIES.index(quantity) for quantity in budget.limits]
        floor = float(sum(found.cost.min() for _, _, found in choices))
        excess = table.objective(known) - floor
        least = np.sum([found.usage[limited].min(axis=1) for _, _, found in choices], axis=0)
        limits = np.array(list(budget.limits.values()))
        headroom = np.maximum(limits * (1 + TOLERANCE) - least, TOLERANCE * limits)
        layers = [
            _scaled(layer, rows, found, known[:, layer], limited, excess, headroom) for layer, rows, found in choices
        ]
        return cls(floor, excess, layers)


def _part(table: CostTable, budget: Budget, layer: int, rows: slice) -> Choices:
    """The widths of one operand of a layer; the other operand counts nothing."""
    side = table.sides[rows.start]
    chosen = side.columns(layer)
    columns = np.full((2, len(chosen)), -1)
    columns[rows] = chosen
    bits = np.zeros_like(columns)
    bits[rows] = side.bits_at(chosen)
    cost = np.where(chosen >= 0, side.cost[layer, chosen], 0.0)
    return Choices(columns, bits, cost, table.meter(budget).use(layer, *bits))


def _scaled(
    layer: int,
    rows: slice,
    choices: Choices,
    known: IntArray,
    limited: list[int],
    excess: float,
    headroom: FloatArray,
) -> _Layer:
    """One layer's pairs, or one operand's widths, in scaled units, without those that cannot help."""
    cost = (choices.cost - choices.cost.min()) / excess if excess > 0 else np.zeros_like(choices.cost)
    usage = choices.usage[limited]
    usage = (usage - usage.min(axis=1, keepdims=True)) / headroom[:, None]
    start = int(np.flatnonzero((choices.columns[rows] == known[rows, None]).all(axis=0))[0])
    worth = np.vstack([cost, usage])
    no_worse_than_start: BoolArray = np.all(worth <= worth[:, [start]], axis=0)
    fits = np.all(worth <= 1 + TOLERANCE, axis=0) | no_worse_than_start
    kept = np.flatnonzero(fits & ~_dominated(worth))
    scaled = np.where(worth < _NEGLIGIBLE, 0.0, worth)[:, kept]
    first = int(no_worse_than_start[kept].argmax())
    return _Layer(layer, rows, choices.columns[:, kept], scaled[0], scaled[1:], first)


def _dominated(worth: FloatArray) -> BoolArray:
    """Which columns of [K, P] another column beats or equals in every row; of equal columns the last (widest) stays."""
    no_worse = (worth[:, :, None] <= worth[:, None, :]).all(axis=0)
    equal = no_worse & no_worse.T
    later = np.tril(np.ones_like(equal), k=-1)
    return np.asarray((no_worse & (~equal | later)).any(axis=0))


def _weighted(picks: list[list[mip.Var]], weights: Iterable[FloatArray]) -> mip.LinExpr:
    """Sum of weight * pick over layers and pairs."""
    return mip.xsum(
        float(weight) * pick
        for row, values in zip(picks, weights, strict=True)
        for pick, weight in zip(row, values, strict=True)
    )


def _tied(table: CostTable, assignment: Assignment) -> Assignment:
    """The widest tied pair of every layer that is no wider than `assignment`, or else its lowest tied pair."""
    bits = table.widths(assignment)
    chosen = []
    for layer in range(len(table.layers)):
        pairs = table.choices(layer, tied=True)
        within = np.flatnonzero((pairs.bits <= bits[:, [layer]]).all(axis=0))
        chosen.append(pairs.columns[:, within[-1] if within.size else 0])
    return np.stack(chosen, axis=1)


ALLOCATOR = Milp()
