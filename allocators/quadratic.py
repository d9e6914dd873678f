"""Bits under interactions between layers: Mix-QViT's integer quadratic program, linearised.

    minimise   sum_i c_i(b_i) + sum_ij 2 r_ij sqrt(c_i(b_i) c_j(b_j))    over operands i of layers

The second term is how errors of two operands add up in a loss that is quadratic in them: r_ij is the correlation of
what they do to the output, measured on a sample of pairs (`fxquant.sensitivity.interactions`); 0 elsewhere. A product
of two one-hot choices becomes continuous y_ij(b, b') whose margins are the choices (exact; Padberg 1989).
Deliberately not done: interactions of three operands, and a proof where the solver runs out of time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import mip
import numpy as np

from allocators.allocation import Allocation
from allocators.milp import Milp
from allocators.problem.arrays import FloatArray
from allocators.problem.budget import QUANTITIES, Budget
from allocators.problem.cost_table import Assignment, CostTable
from allocators.problem.operands import ROWS, Choices, Place
from fxquant.checks.hints import check_fields
from fxquant.errors import BudgetError, SensitivityError

OperandName = tuple[str, Place]
"""A layer and which of its operands."""

_OBJECTIVE_SCALE: Final = 1e3
"""What the start's objective counts for in the solver's: CBC passes over improvements below 1e-5."""

_HEADROOM: Final = 1 - 2e-6
"""Share of a limit given to the solver, whose answers slip by its tolerance."""


@dataclass(frozen=True)
class Interaction:
    """Correlation, -1 to 1, between what the errors of two operands do to the output.

    Args:
        first, second: the two operands.
        correlation: from -1 to 1.
    """

    first: OperandName
    second: OperandName
    correlation: float

    def __post_init__(self) -> None:
        """Raise SensitivityError for a correlation out of range, or an operand with itself."""
        check_fields(self, SensitivityError)
        if not -1 <= self.correlation <= 1 or self.first == self.second:
            raise SensitivityError(
                f"an interaction is between two different operands and has a correlation from -1 to 1; found {self}"
            )


@dataclass(frozen=True)
class Quadratic:
    """Bits that minimise cost with interactions within a budget, by CBC; never worse in it than `Milp`'s bits.

    Args:
        interactions: pairs that interact.
        time_limit_s: wall time given to the solver, s.
        relative_gap: stop within it. The allocation's objective remains the table's sum of costs, so that it compares
            with other allocators'; status is "optimal" where the solver proved the interacting one.
    """

    interactions: tuple[Interaction, ...]
    time_limit_s: float = 60.0
    relative_gap: float = 1e-3

    def __post_init__(self) -> None:
        """Raise BudgetError for options that do not fit."""
        check_fields(self, BudgetError)
        if not self.time_limit_s > 0 or not 0 <= self.relative_gap < 1:
            raise BudgetError(f"time_limit_s must be above 0, and relative_gap at least 0 and below 1; found {self}")

    def allocate(self, table: CostTable, budget: Budget) -> Allocation:
        """The bits of every layer.

        Raises InfeasibleBudgetError, or BudgetError where an interaction names no operand of the table.
        """
        started_s = time.perf_counter()
        known = {operand for side in table.sides for operand in zip(table.layers, side.places, strict=True)}
        unknown = {operand for pair in self.interactions for operand in (pair.first, pair.second)} - known
        if unknown:
            raise BudgetError(f"interactions name operands that the table does not have: {sorted(unknown)}")
        additive = Milp(time_limit_s=self.time_limit_s / 4).allocate(table, budget)
        best, proven = additive.assignment(table), False
        found, optimal = self._solve(table, budget, best)
        if found is not None and not budget.exceeded(table.usage(found, budget)):
            proven = optimal
            best = min(found, best, key=lambda assignment: self.objective(table, assignment))
        status: Literal["optimal", "feasible"] = "optimal" if proven else "feasible"
        seconds = time.perf_counter() - started_s
        return Allocation.of(table, best, budget, status=status, gap=None, solver="quadratic-cbc", seconds=seconds)

    def objective(self, table: CostTable, assignment: Assignment) -> float:
        """Cost with interactions of an assignment."""
        total = table.objective(assignment)
        for pair in self.interactions:
            costs = [_cost(table, operand, assignment) for operand in (pair.first, pair.second)]
            total += 2 * pair.correlation * float(np.sqrt(costs[0] * costs[1]))
        return total

    def _solve(self, table: CostTable, budget: Budget, start: Assignment) -> tuple[Assignment | None, bool]:
        """The solver's assignment, if any, and whether it is proven within the gap."""
        model = mip.Model(sense=mip.MINIMIZE, solver_name=mip.CBC)
        model.verbose = 0
        model.threads = 1
        model.seed = 0
        model.max_mip_gap = self.relative_gap
        unit = _OBJECTIVE_SCALE / max(self.objective(table, start), 1e-300)
        choices = [table.choices(layer, budget) for layer in range(len(table.layers))]
        picks = [[model.add_var(var_type=mip.BINARY) for _ in found.cost] for found in choices]
        for row in picks:
            model += mip.xsum(row) == 1
        for quantity, limit in budget.limits.items():
            usage = [found.usage[QUANTITIES.index(quantity)] / limit for found in choices]
            model += _weighted(picks, usage) <= _HEADROOM
        terms = [_weighted(picks, [unit * found.cost for found in choices])]
        terms += [term for pair in self.interactions for term in self._term(model, table, pair, picks, choices, unit)]
        model.objective = mip.xsum(terms)
        model.start = [
            (row[int(np.flatnonzero((found.columns == start[:, [layer]]).all(0))[0])], 1.0)
            for layer, (row, found) in enumerate(zip(picks, choices, strict=True))
        ]
        status = model.optimize(max_seconds=self.time_limit_s)
        if status not in (mip.OptimizationStatus.OPTIMAL, mip.OptimizationStatus.FEASIBLE):
            return None, False
        chosen = [found.columns[:, int(np.argmax([p.x for p in r]))] for r, found in zip(picks, choices, strict=True)]
        return np.stack(chosen, axis=1), status is mip.OptimizationStatus.OPTIMAL

    def _term(
        self,
        model: mip.Model,
        table: CostTable,
        pair: Interaction,
        picks: Sequence[Sequence[mip.Var]],
        choices: Sequence[Choices],
        unit: float,
    ) -> list[mip.LinExpr]:
        """2 r sqrt(c c') y over all pairs of widths; none where an operand is not allocated."""
        margins = [_margin(table, operand, picks, choices) for operand in (pair.first, pair.second)]
        if not all(margins):
            return []
        joint = {(i, j): model.add_var(lb=0) for i in margins[0] for j in margins[1]}
        for i, (share, _) in margins[0].items():
            model += mip.xsum(joint[i, j] for j in margins[1]) == share
        for j, (share, _) in margins[1].items():
            model += mip.xsum(joint[i, j] for i in margins[0]) == share
        factor = 2 * pair.correlation * unit
        return [
            factor * float(np.sqrt(margins[0][i][1] * margins[1][j][1])) * variable
            for (i, j), variable in joint.items()
        ]


def _margin(
    table: CostTable, operand: OperandName, picks: Sequence[Sequence[mip.Var]], choices: Sequence[Choices]
) -> Mapping[int, tuple[mip.LinExpr, float]]:
    """By column of an operand: the sum of the picks that take it, and its cost; empty where it is not allocated."""
    layer, row = table.layers.index(operand[0]), ROWS[operand[1]]
    columns = choices[layer].columns[row]
    return {
        int(column): (
            mip.xsum(pick for pick, taken in zip(picks[layer], columns, strict=True) if taken == column),
            float(table.cost[row, layer, column]),
        )
        for column in np.unique(columns)
        if column >= 0
    }


def _cost(table: CostTable, operand: OperandName, assignment: Assignment) -> float:
    layer, row = table.layers.index(operand[0]), ROWS[operand[1]]
    column = int(assignment[row, layer])
    return float(table.cost[row, layer, column]) if column >= 0 else 0.0


def _weighted(picks: Sequence[Sequence[mip.Var]], weights: Sequence[FloatArray]) -> mip.LinExpr:
    return mip.xsum(
        float(weight) * pick
        for row, values in zip(picks, weights, strict=True)
        for pick, weight in zip(row, values, strict=True)
    )
