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
    """Every layer at the budget's mean widths, or the nearest width its overrides allow, which may raise the means.

    A quantity without a limit leaves its tensors at the widest candidate.
    """

    def allocate(self, table: CostTable, budget: Budget) -> Allocation:
        """The uniform bits.

        Raises:
            BudgetError: the budget names bytes, bit operations or a latency only, from which no width follows, or these
                widths exceed what it says of them.
        """
        started_s = time.perf_counter()
        means: tuple[float | None, float | None] = (budget.mean_weight_bits, budget.mean_activation_bits)
        if means == (None, None):
            if budget.like_uniform_bits is None:
                raise BudgetError(f"Uniform needs mean bits, and the budget is {budget}: give one such as 'W4A4'")
            means = (budget.like_uniform_bits, budget.like_uniform_bits)
        widest = table.bits[-1]
        bits = [int(widest if mean is None else min(mean, widest)) for mean in means]
        assignment = table.uniform(*bits)
        beyond = [name for name in budget.exceeded(table.usage(assignment, budget)) if not name.startswith("mean_")]
        if beyond:
            raise BudgetError(
                f"Uniform takes its widths from mean bits, and at those of the budget {str(budget)!r} it exceeds its "
                f"{' and '.join(beyond)}: lower the mean bits, or give an allocator that looks at it, such as Milp()"
            )
        return Allocation.of(
            table,
            assignment,
            budget,
            status="heuristic",
            gap=None,
            solver="uniform",
            seconds=time.perf_counter() - started_s,
        )


ALLOCATOR = Uniform()
