from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators.allocation import Allocation
from allocators.allocator import Allocator
from allocators.frontier import frontier
from allocators.greedy import Greedy
from allocators.milp import Milp
from allocators.module_frontier import ModuleFrontier
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from allocators.problem.latency_table import rising
from allocators.quadratic import Quadratic
from allocators.swaps import Swaps
from fxquant.errors import ArtefactError, BudgetError, InfeasibleBudgetError, SensitivityError
from tests.allocators.tables import brute_force, budget_between, plain_table, random_table

ALLOCATORS: list[Allocator] = [Milp(), Greedy(), Swaps(), ModuleFrontier(False, False), Quadratic(())]


def timed(**changes: Any) -> CostTable:
    """`plain_table` with two digits, and so twice the time, for 8 activation bits; 1 ms counts with the first layer."""
    times = np.ones((3, 3, 3)) * np.array([1.0, 1.0, 2.0])
    times[0] += 1.0
    return plain_table(**{"latency_ms": times, **changes})


def test_a_latency_is_the_sum_over_layers() -> None:
    table = timed()
    assert table.usage(table.lowest())["latency_ms"] == 4
    assert table.usage(table.highest())["latency_ms"] == 7
    assert table.usage(table.uniform(8, 4))["latency_ms"] == 4, "weights take the same time at every width"


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=lambda each: type(each).__name__)
def test_only_the_layers_that_cost_least_are_narrowed(allocator: Allocator) -> None:
    found = allocator.allocate(timed(), Budget(latency_ms=6))
    assert found.usage["latency_ms"] == 6
    assert set(found.weight_bits.values()) == {8}
    assert sorted(found.activation_bits.values()) == [4, 8, 8]
    assert found.binding == ("latency_ms",)


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=lambda each: type(each).__name__)
def test_out_of_reach(allocator: Allocator) -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"latency_ms 3\.9 is below the minimum reachable 4, with"):
        allocator.allocate(timed(), Budget(latency_ms=3.9))
    with pytest.raises(InfeasibleBudgetError, match=r"pinned by head \(W8A8, \+1\)"):
        allocator.allocate(timed().override({"head": 8}), Budget(latency_ms=4))


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=lambda each: type(each).__name__)
def test_without_measured_times(allocator: Allocator) -> None:
    with pytest.raises(BudgetError, match="no times have been measured"):
        allocator.allocate(plain_table(), Budget(latency_ms=5))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), part=st.floats(0, 1), others=st.dictionaries(
    st.sampled_from(["mean_weight_bits", "weight_bytes", "bit_operations"]), st.floats(0, 1), max_size=2
))  # fmt: skip
def test_every_allocator_keeps_the_latency_and_none_beats_brute_force(
    seed: int, part: float, others: dict[str, float]
) -> None:
    table = random_table(seed, count=4)
    budget = budget_between(table, {"latency_ms": part, **others})
    best = brute_force(table, budget)
    for allocator in ALLOCATORS:
        found = allocator.allocate(table, budget)
        assert not budget.exceeded(found.usage)
        assert found.objective >= best * (1 - 1e-9)
    assert Milp().allocate(table, budget).objective == pytest.approx(best, rel=1e-6)


def test_both_operands_may_have_to_fall_before_a_layer_is_faster() -> None:
    times = np.full((3, 3, 3), 1.0)
    times[:, 1:, :] = times[:, :, 1:] = 2.0
    for allocator in ALLOCATORS:
        assert allocator.allocate(timed(latency_ms=times), Budget(latency_ms=3)).usage["latency_ms"] == 3


def test_wider_is_never_faster() -> None:
    measured = np.array([[2.0, 1.0], [1.5, 3.0]])
    assert rising(measured).tolist() == [[2.0, 2.0], [2.0, 3.0]]
    falling = np.ones((3, 3, 3))
    falling[2, 0, 2] = 0.5
    with pytest.raises(SensitivityError, match=r"'head' at columns 0, 2 is 0\.5"):
        timed(latency_ms=falling)
    for wrong in (np.full((3, 3, 3), np.nan), -np.ones((3, 3, 3)), np.full((3, 3, 3), np.inf)):
        with pytest.raises(SensitivityError, match=r"'blocks\.0\.fc1' at columns 0, 0"):
            timed(latency_ms=wrong)
    with pytest.raises(SensitivityError, match=r"latency_ms must have shape \(3, 3, 3\)"):
        timed(latency_ms=np.ones((3, 3)))


def test_kept_as_json() -> None:
    table = timed()
    again = CostTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again.usage(again.highest()) == table.usage(table.highest())
    assert CostTable.from_dict(plain_table().to_dict()).latency_ms is None
    found = Milp().allocate(table, Budget.parse("W4, 6ms"))
    assert Allocation.from_json(found.to_json()) == found
    without = Milp().allocate(plain_table(), Budget.parse("W4"))
    assert "latency_ms" not in without.usage
    assert Allocation.from_json(without.to_json()) == without
    values = json.loads(without.to_json())
    del values["usage"]["bit_operations"]
    with pytest.raises(ArtefactError, match="'usage'"):
        Allocation.from_json(json.dumps(values))


def test_the_frontier_along_the_latency() -> None:
    points = frontier(timed(), "latency_ms", [4, 5, 6, 7], Milp())
    assert [point.limit for point in points] == [4, 5, 6, 7]
    assert [round(point.allocation.usage["latency_ms"]) for point in points] == [4, 5, 6, 7]
    hull = frontier(timed(), "latency_ms", [4, 5, 6, 7])
    assert hull[-1].loss == pytest.approx(points[-1].loss)
