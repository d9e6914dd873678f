import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators.milp import Milp
from allocators.problem.budget import Budget
from allocators.quadratic import Interaction, Quadratic
from fxquant.errors import BudgetError, SensitivityError
from tests.allocators.tables import random_table


def some_interactions(table, seed, count=4):
    generator = np.random.default_rng(seed)
    operands = [(layer, place) for side in table.sides for layer, place in zip(table.layers, side.places, strict=True)]
    pairs = list(itertools.combinations(operands, 2))
    chosen = generator.choice(len(pairs), count, replace=False)
    return tuple(Interaction(*pairs[i], float(generator.uniform(-0.9, 0.9))) for i in chosen)


def all_assignments(table):
    pairs = [table.choices(layer).columns.T for layer in range(len(table.layers))]
    for chosen in itertools.product(*pairs):
        yield np.stack(chosen, axis=1)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 0.9))
def test_equals_brute_force(seed, share):
    """Within a thousandth, in its own objective; the budget holds."""
    table = random_table(seed, count=3, bits=(2, 4), decades=1.0)
    low, high = (table.usage(found)["bit_operations"] for found in (table.lowest(), table.highest()))
    budget = Budget(bit_operations=max(low + share * (high - low), low, 1.0))
    allocator = Quadratic(some_interactions(table, seed), relative_gap=1e-6)
    allocation = allocator.allocate(table, budget)
    feasible = (a for a in all_assignments(table) if not budget.exceeded(table.usage(a, budget)))
    best = min(allocator.objective(table, assignment) for assignment in feasible)
    assert not budget.exceeded(allocation.usage)
    assignment = allocation.assignment(table)
    assert table.objective(assignment) == pytest.approx(allocation.objective)
    assert allocator.objective(table, assignment) == pytest.approx(best, rel=1e-3, abs=1e-9)


def test_without_interactions_it_is_milp():
    table = random_table(3, count=5)
    budget = Budget(mean_weight_bits=4, mean_activation_bits=5)
    quadratic, milp = Quadratic(()).allocate(table, budget), Milp().allocate(table, budget)
    assert quadratic.objective == pytest.approx(milp.objective, rel=2e-3)


def test_errors():
    with pytest.raises(SensitivityError, match="correlation"):
        Interaction(("a", "weight"), ("b", "weight"), 1.5)
    with pytest.raises(SensitivityError, match="two different operands"):
        Interaction(("a", "weight"), ("a", "weight"), 0.5)
    pair = Interaction(("nowhere", "weight"), ("blocks.0.qkv", "weight"), 0.5)
    with pytest.raises(BudgetError, match="nowhere"):
        Quadratic((pair,)).allocate(random_table(0), Budget(mean_weight_bits=4))
