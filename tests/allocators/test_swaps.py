"""Swaps: within the budget, at a local optimum, never better than the program, close to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import random_table

from allocators.milp import Milp
from allocators.problem.budget import Budget
from allocators.swaps import Swaps
from fxquant.errors import InfeasibleBudgetError


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.floats(2.2, 7.8), operations=st.booleans())
def test_budget_is_met_and_no_step_up_fits(seed: int, bits: float, operations: bool) -> None:
    table = random_table(seed, count=5)
    budget = Budget(mean_weight_bits=bits, mean_activation_bits=bits)
    if operations:
        middle = table.usage(table.uniform(bits, bits), budget)["bit_operations"]
        budget = Budget(mean_weight_bits=bits, mean_activation_bits=bits, bit_operations=max(middle, 1.0))
    if budget.exceeded(table.minimum_usage(budget)):
        return
    assignment = Swaps().assign(table, budget)
    assert not budget.exceeded(table.usage(assignment, budget))
    best = table.objective(assignment)
    for row, side in enumerate(table.sides):
        for layer in range(len(table.layers)):
            wider = side.columns(layer)[side.columns(layer) > assignment[row, layer]]
            if assignment[row, layer] >= 0 and wider.size:
                raised = assignment.copy()
                raised[row, layer] = wider[0]
                if not budget.exceeded(table.usage(raised, budget)):
                    assert table.objective(raised) >= best * (1 - 1e-9)


def test_close_to_the_program_and_never_better() -> None:
    table = random_table(3, count=30)
    budget = Budget.parse("W4A4")
    local, optimal = Swaps().allocate(table, budget), Milp().allocate(table, budget)
    assert optimal.objective <= local.objective * (1 + 1e-12)
    assert local.objective <= optimal.objective * 1.05
    assert local.status == "heuristic"


def test_infeasible() -> None:
    with pytest.raises(InfeasibleBudgetError):
        Swaps().allocate(random_table(0, count=3), Budget(mean_weight_bits=1))


def test_same_answer_twice() -> None:
    table, budget = random_table(11, count=20, masked=False), Budget.parse("W5A3")
    assert np.array_equal(Swaps().assign(table, budget), Swaps().assign(table, budget))
