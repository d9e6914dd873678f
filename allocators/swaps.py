"""Descent and swaps: lower what costs least per unit of budget freed, then trade single steps while that helps.

    step with the least  (cost_next - cost) / sum_q (usage_q - usage_q,next) / limit_q,   q over exceeded quantities

A step moves one operand of one layer to the next allowed width. Once the budget is met, one step up that fits, or one
step up paid for by one step down, is taken as long as it lowers the summed cost (HAWQ-style local search).
The answer is a local optimum found in milliseconds: `Milp` starts from it.
Deliberately not done: trades of more than two steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from allocators.allocation import Allocation
from allocators.problem.arrays import FloatArray, IntArray
from allocators.problem.budget import QUANTITIES, Budget
from allocators.problem.cost_table import Assignment, CostTable
from allocators.problem.usage import Meter
from fxquant.checks.hints import check_fields
from fxquant.errors import BudgetError


@dataclass(frozen=True)
class Swaps:
    """A local optimum under single steps and pairs of steps.

    Args:
        rounds: how many trades at most.
    """

    rounds: int = 1000

    def __post_init__(self) -> None:
        """Raise BudgetError for options that do not fit."""
        check_fields(self, BudgetError)
        if self.rounds < 0:
            raise BudgetError(f"rounds are at least 0, not {self.rounds}")

    def allocate(self, table: CostTable, budget: Budget) -> Allocation:
        """The bits of every layer.

        Raises:
            InfeasibleBudgetError: no allocation meets the budget.
        """
        started_s = time.perf_counter()
        table.check_feasible(budget)
        return Allocation.of(
            table,
            self.assign(table, budget),
            budget,
            status="heuristic",
            gap=None,
            solver="swaps",
            seconds=time.perf_counter() - started_s,
        )

    def assign(self, table: CostTable, budget: Budget) -> Assignment:
        """The columns of every layer; the budget must be feasible."""
        limited = [QUANTITIES.index(quantity) for quantity in budget.limits]
        limits = np.array(list(budget.limits.values()))
        meter = table.meter(budget)
        assignment = table.highest()
        while budget.exceeded(meter.total(*table.widths(assignment))):
            used = meter.sums(*table.widths(assignment))[limited]
            down = _steps(table, meter, assignment, limited, -1)
            freed = (np.where(used > limits, -down.usage.T, 0.0) / limits).sum(axis=1)
            useful = freed > 0
            rate = np.where(useful, np.maximum(down.cost, 0.0) / np.where(useful, freed, 1.0), np.inf)
            # Among free steps the one that frees most goes first.
            best = int(np.lexsort((-freed, rate))[0])
            assignment[down.rows[best], down.layers[best]] = down.columns[best]
        for _ in range(self.rounds):
            trade = _best_trade(table, meter, assignment, limited, budget, limits)
            if trade is None:
                break
            assignment = trade
        return assignment


class _Steps(NamedTuple):
    """Single steps from an assignment: S of them. usage: float64 [Q, S], change of each limited quantity."""

    rows: IntArray
    layers: IntArray
    columns: IntArray
    cost: FloatArray
    usage: FloatArray


def _steps(table: CostTable, meter: Meter, assignment: Assignment, limited: list[int], direction: int) -> _Steps:
    """All steps up (+1) or down (-1) to the next allowed width, in a fixed order."""
    bits = table.widths(assignment)
    before = meter.use(slice(None), bits[0], bits[1])
    found = []
    for row, side in enumerate(table.sides):
        current = assignment[row][:, None]
        ahead = side.allowed & (direction * (np.arange(len(side.bits)) - current) > 0) & (current >= 0)
        layers = np.flatnonzero(ahead.any(axis=1))
        ahead = ahead[layers, ::direction]
        columns = np.arange(len(side.bits))[::direction][ahead.argmax(axis=1)]
        moved = bits.copy()
        moved[row, layers] = side.bits[columns]
        change = meter.use(slice(None), moved[0], moved[1]) - before
        cost = side.cost[layers, columns] - side.cost[layers, assignment[row, layers]]
        found.append(_Steps(np.full(len(layers), row), layers, columns, cost, change[limited][:, layers]))
    return _Steps(*(np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True)))


def _best_trade(
    table: CostTable,
    meter: Meter,
    assignment: Assignment,
    limited: list[int],
    budget: Budget,
    limits: FloatArray,
) -> Assignment | None:
    """The assignment after the step up, or pair of steps, that lowers the cost most within the budget; None if none."""
    up, down = (_steps(table, meter, assignment, limited, direction) for direction in (1, -1))
    if not up.cost.size:
        return None
    used = meter.sums(*table.widths(assignment))[limited]
    nothing = np.zeros((len(limited), 1))
    usage = used[:, None, None] + up.usage[:, :, None] + np.concatenate([nothing, down.usage], axis=1)[:, None, :]
    gain = up.cost[:, None] + np.concatenate([[0.0], down.cost])[None, :]
    same = (up.rows[:, None] == down.rows) & (up.layers[:, None] == down.layers)
    allowed = (usage <= limits[:, None, None]).all(axis=0) & ~np.pad(same, ((0, 0), (1, 0)))
    gain = np.where(allowed, gain, np.inf)
    for flat in np.argsort(gain, axis=None, kind="stable")[:8]:
        first, second = divmod(int(flat), gain.shape[1])
        if not gain[first, second] < -1e-12 * abs(table.objective(assignment)):
            return None
        trade = assignment.copy()
        trade[up.rows[first], up.layers[first]] = up.columns[first]
        if second:
            trade[down.rows[second - 1], down.layers[second - 1]] = down.columns[second - 1]
        # A pair within one layer changes bit operations by more than the sum of its steps.
        if not budget.exceeded(meter.total(*table.widths(trade))):
            return trade
    return None


ALLOCATOR = Swaps()
