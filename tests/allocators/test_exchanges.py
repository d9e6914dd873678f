"""Exchanges against listing every subset of steps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators.exchanges import Step, exchanges, steps
from allocators.problem.budget import Budget
from allocators.problem.cost_table import Assignment, CostTable
from tests.allocators.tables import plain_table, random_table


def middle(table: CostTable) -> Assignment:
    """Every layer at its middle allowed width."""
    columns = [[side.columns(layer) for layer in range(len(table.layers))] for side in table.sides]
    return np.array([[found[len(found) // 2] for found in row] for row in columns])


def used_as_is(table: CostTable, assignment: Assignment, slack: float) -> Budget:
    """A budget that the assignment leaves this much slack in."""
    usage = table.usage(assignment, Budget(mean_weight_bits=1, mean_activation_bits=1))
    limits = {name: usage[name] * slack for name in ("mean_weight_bits", "mean_activation_bits")}
    return Budget(**limits, bit_operations=usage["bit_operations"] * slack)


def applied(assignment: Assignment, taken: list[Step]) -> Assignment:
    changed = assignment.copy()
    for step in taken:
        changed[:, step.layer] = step.columns
    return changed


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 1.05, 1.2]), st.booleans())
def test_all_and_only_the_exchanges_that_fit_and_promise_something(seed: int, slack: float, tied: bool) -> None:
    table = random_table(seed, count=4, masked=False)
    assignment = middle(table)
    budget = used_as_is(table, assignment, slack)
    offered = steps(table, assignment, range(4), budget, tied=tied)
    change = np.random.default_rng(seed).uniform(-1, 1, len(offered))
    found = list(exchanges(table, assignment, budget, offered, change))
    expected = {}
    for size in (1, 2, 3):
        for members in itertools.combinations(range(len(offered)), size):
            taken = [offered[member] for member in members]
            ups = sum(step.direction > 0 for step in taken)
            distinct = len({step.layer for step in taken}) == size
            net = change[list(members)].sum()
            if distinct and 0 < ups <= 2 and (ups < size or size == 1) and net < 0:
                after = table.usage(applied(assignment, taken), budget)
                expected |= {} if budget.exceeded(after) else {frozenset(members): net}
    assert len(found) == len(expected)
    nets = [net for net, _ in found]
    assert nets == sorted(nets)
    for net, taken in found:
        members = frozenset(offered.index(step) for step in taken)
        assert net == pytest.approx(expected[members])


def test_one_large_layer_is_paid_for_by_two_small_ones() -> None:
    """fc1 has twice the weights of the others: no single one pays for it."""
    table = plain_table(
        layers=("fc1", "proj", "fc2"),
        roles=("fc1", "proj", "fc2"),
        first_elements=[4, 2, 2],
        second_elements=[0] * 3,
    )
    assignment = np.array([[1, 1, 1], [-1, -1, -1]])
    budget = Budget(mean_weight_bits=4.0 + 0.01)
    offered = steps(table, assignment, range(3), budget, tied=True)
    change = np.array([step.direction * -1.0 if step.layer == 0 else 0.1 for step in offered])
    ranked = list(exchanges(table, assignment, budget, offered, change, size=2))
    assert all(step.layer != 0 or step.direction < 0 for _, taken in ranked for step in taken)
    # 4 bits more on fc1 are 16; 2 fewer on each of the others are 8.
    wider = Budget(mean_weight_bits=4.0 + 8 / 8)
    _, best = next(exchanges(table, assignment, wider, offered, change, size=3))
    assert [(step.layer, step.direction) for step in best] == [(0, 1), (1, -1), (2, -1)]


def test_tied_steps_move_both_operands_and_free_ones_either() -> None:
    table = plain_table()
    assignment = np.array([[1, -1, 1], [1, 1, 1]])
    budget = Budget.parse("W8A8")
    assert [(s.layer, s.columns) for s in steps(table, assignment, [0, 1], budget, tied=True)] == [
        (0, (2, 2)), (0, (0, 0)), (1, (-1, 2)), (1, (-1, 0))
    ]  # fmt: skip
    free = steps(table, assignment, [0], budget, tied=False)
    assert [s.columns for s in free] == [(2, 1), (1, 2), (0, 1), (1, 0)]
    assert steps(table, table.highest(), [0], budget, tied=True)[0].direction == -1


def test_no_exchange() -> None:
    table = plain_table()
    assert list(exchanges(table, table.highest(), Budget.parse("W8A8"), [], np.zeros(0))) == []
