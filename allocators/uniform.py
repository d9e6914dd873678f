"""Single precision: every layer at the same widths; the rows that mixed precision is compared with.

Deliberately not done: choosing the widths; `Uniform` takes them from the budget's means, rounded down.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from allocators.allocation import Allocation
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from fxquant.errors import BudgetError


@dataclass(frozen=True)
class Uniform:
    """Every layer at the budget's mean widths, or the nearest width its overrides allow.

    A quantity without a limit leaves its tensors at the widest candidate.
    """

    def allocate(self, table: CostTable, budget: Budget) -> Allocation:
        """The uniform bits.

        Raises:
            BudgetError: the budget names bytes or bit operations only, from which no width follows.
        """
        started_s = time.perf_counter()
        means: tuple[float | None, float | None] = (budget.mean_weight_bits, budget.mean_activation_bits)
        if means == (None, None):
            if budget.like_uniform_bits is None:
                raise BudgetError(f"Uniform needs mean bits, and the budget is {budget}: give one such as 'W4A4'")
            means = (budget.like_uniform_bits, budget.like_uniform_bits)
        widest = table.bits[-1]
        bits = [int(widest if mean is None else min(mean, widest)) for mean in means]
        return Allocation.of(
            table,
            table.uniform(*bits),
            budget,
            status="heuristic",
            gap=None,
            solver="uniform",
            seconds=time.perf_counter() - started_s,
        )


ALLOCATOR = Uniform()
