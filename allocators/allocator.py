"""What an allocator is: one method from a cost table and a budget to an allocation."""

from __future__ import annotations

from typing import Protocol

from allocators.allocation import Allocation
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable


class Allocator(Protocol):
    """A frozen value whose fields are its options; the same table and budget always give the same bits."""

    def allocate(self, table: CostTable, budget: Budget) -> Allocation:
        """The bits of every layer of `table` within `budget`.

        Raises:
            InfeasibleBudgetError: no allocation meets the budget.
        """
        ...
