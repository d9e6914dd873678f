"""Greedy mixed precision: start at the widest and keep lowering the tensor that can best afford it.

    SQNR_b(X) = 10 log10(sum X^2 / sum (X - Q_b(X))^2)    (MPTQ-ViT, equation 9)
    alpha_l = SQNR_{b-1}(X_l) * log(numel(X_l))           (MPTQ-ViT, equation 10)

X_l of an activation is that of all calibration images, 32 in the paper, so its numel is its elements for one image
times these; to lower weights or activations alone, as here, adds log 32 to every logarithm of the activations.
Weights first, then activations (or the reverse), each until its quantities meet the budget; a heap keeps the largest
alpha on top, O(widths * layers * log layers). Bytes count with the weights. Inputs of a product that share one width
are one tensor. Bit operations, which the paper does not
budget, and latency come last: whichever tensor has the largest alpha is lowered until they are met, by several widths
where the first of them gain no time.
Deliberately not done: looking at costs, or raising a tensor again.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from allocators.allocation import Allocation
from allocators.problem.arrays import BoolArray, FloatArray
from allocators.problem.budget import QUANTITIES, TOLERANCE, Budget
from allocators.problem.cost_table import Assignment, CostTable
from fxquant.checks.hints import check_fields
from fxquant.errors import BudgetError

_LARGEST_SQNR_DB: Final = 1e3
"""Stands for an infinite SQNR (an exact representation), so that infinity times log(1) stays a number."""


@dataclass(frozen=True)
class Greedy:
    """MPTQ-ViT's Greedy MP.

    Args:
        metric: "sqnr-numel" is equation 10; "sqnr" leaves the logarithm out (the paper's ablation).
        order: which operand is lowered first; the other only shares bit operations with it.
        minimum_bits: no tensor goes below, unless it is allowed nothing else.
        images: how many images an activation's elements are counted over; 1 counts those of one image.
    """

    metric: Literal["sqnr-numel", "sqnr"] = "sqnr-numel"
    order: Literal["weights-first", "activations-first"] = "weights-first"
    minimum_bits: int = 2
    images: int = 32

    def __post_init__(self) -> None:
        """Raise BudgetError for options that do not fit."""
        check_fields(self, BudgetError)
        if not 1 <= self.minimum_bits <= 8 or self.images < 1:
            raise BudgetError(f"minimum_bits is a width of up to 8 bits, and images at least 1; found {self}")

    def allocate(self, table: CostTable, budget: Budget) -> Allocation:
        """The greedy bits; a quantity without a limit leaves its tensors at the widest.

        Raises:
            InfeasibleBudgetError: the budget is not met even with everything at its lowest.
        """
        started_s = time.perf_counter()
        assignment = self.assign(table, budget)
        return Allocation.of(
            table,
            assignment,
            budget,
            status="heuristic",
            gap=None,
            solver="greedy",
            seconds=time.perf_counter() - started_s,
        )

    def assign(self, table: CostTable, budget: Budget) -> Assignment:
        """The columns of the greedy bits, int64 [2, L]."""
        table = table.at_least(self.minimum_bits)
        table.check_feasible(budget)
        descent = _Descent(table, budget, self._alpha(table))
        weights, everything = table.is_weight, np.ones((2, len(table.layers)), dtype=bool)
        phases = [(weights, ("mean_weight_bits", "weight_bytes")), (~weights, ("mean_activation_bits",))]
        if self.order == "activations-first":
            phases.reverse()
        for tensors, quantities in [*phases, (everything, ("bit_operations",)), (everything, ("latency_ms",))]:
            descent.lower(tensors, quantities)
        # Both operands of a layer may have to fall together before it is any faster.
        is_met = not budget.exceeded(table.usage(descent.assignment, budget))
        return descent.assignment if is_met else table.lowest()

    def _alpha(self, table: CostTable) -> FloatArray:
        """Alpha of moving to each column, float64 [2, L, C]."""
        sqnr_db = np.clip(table.sqnr_db, -_LARGEST_SQNR_DB, _LARGEST_SQNR_DB)
        if self.metric == "sqnr":
            return sqnr_db
        counted = table.elements * np.where(table.is_weight, 1, self.images)
        return np.asarray(sqnr_db * np.log(np.maximum(counted, 1))[..., None])


class _Descent:
    """An assignment on its way down, with its usage kept up to date."""

    def __init__(self, table: CostTable, budget: Budget, alpha: FloatArray) -> None:
        self.assignment = table.highest()
        self._sides = table.sides
        self._columns = [[side.columns(layer).tolist() for layer in range(len(table.layers))] for side in self._sides]
        self._alpha = alpha
        self._meter = table.meter(budget)
        self._limits = np.array([budget.limits.get(quantity, np.inf) for quantity in QUANTITIES]) * (1 + TOLERANCE)
        self._usage = self._meter.sums(*table.widths(self.assignment))

    def lower(self, tensors: BoolArray, quantities: Iterable[str]) -> None:
        """Lower these tensors, bool [2, L], largest alpha first, until all `quantities` are within their limits."""
        watched = [QUANTITIES.index(quantity) for quantity in quantities]
        heap = [entry for row, layer in np.argwhere(tensors).tolist() for entry in self._next(row, layer)]
        heapq.heapify(heap)
        while heap and (self._usage[watched] > self._limits[watched]).any():
            _, row, layer, column = heapq.heappop(heap)
            before = self._use(layer)
            old = self.assignment[row, layer]
            self.assignment[row, layer] = column
            change = self._use(layer) - before
            if change[watched].any():
                self._usage += change
            else:
                self.assignment[row, layer] = old
            for entry in self._next(row, layer, column):
                heapq.heappush(heap, entry)

    def _next(self, row: int, layer: int, column: int | None = None) -> list[tuple[float, int, int, int]]:
        """The heap entry of a tensor's allowed column below `column` or its own; ties go to the earlier layer."""
        columns = self._columns[row][layer]
        place = columns.index(self.assignment[row, layer] if column is None else column)
        if place == 0:
            return []
        column = columns[place - 1]
        return [(-float(self._alpha[row, layer, column]), row, layer, column)]

    def _use(self, layer: int) -> FloatArray:
        bits = [side.bits_at(self.assignment[row, layer : layer + 1]) for row, side in enumerate(self._sides)]
        return self._meter.use(layer, bits[0], bits[1])[:, 0]


ALLOCATOR = Greedy()
