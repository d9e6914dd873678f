from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators.frontier import AXES, budget_at, default_limits, frontier, hull, step_of
from allocators.milp import Milp
from allocators.problem.budget import QUANTITIES, Budget
from allocators.problem.cost_table import CostTable
from fxquant.errors import BudgetError, InfeasibleBudgetError
from tests.allocators.tables import brute_force, plain_table, random_table

SEEDS = st.integers(0, 10_000)


def everything(table: CostTable, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Usage and loss of every assignment."""
    choices = [table.choices(layer).columns.T for layer in range(len(table.layers))]
    found = [np.stack(pairs, axis=1) for pairs in itertools.product(*choices)]
    return np.array([table.usage(a)[quantity] for a in found]), np.array([table.objective(a) for a in found])


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, quantity=st.sampled_from(QUANTITIES))
def test_hull_vertices_are_the_tables_lower_convex_hull(seed: int, quantity: str) -> None:
    table = random_table(seed, count=3)
    found = hull(table, quantity)
    usage, loss = everything(table, quantity)
    assert found.usage[0] == pytest.approx(usage.min())
    assert found.loss[-1] == pytest.approx(loss.min())
    assert (np.diff(found.usage) > 0).all()
    assert (np.diff(found.loss) < 0).all()
    slopes = -np.diff(found.loss) / np.diff(found.usage)
    assert (np.diff(slopes) <= 1e-9 * slopes[:-1]).all()
    for vertex in range(len(found.usage)):
        assignment = found.assignment(vertex)
        assert table.usage(assignment)[quantity] == pytest.approx(found.usage[vertex])
        assert table.objective(assignment) == pytest.approx(found.loss[vertex], rel=1e-9, abs=1e-12)
        within = usage <= found.usage[vertex] * (1 + 1e-9)
        assert found.loss[vertex] == pytest.approx(loss[within].min(), rel=1e-9, abs=1e-12)
    # Nothing lies below the hull.
    between = np.interp(usage, found.usage, found.loss)
    assert (loss >= between * (1 - 1e-9) - 1e-12).all()


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, axis=st.sampled_from(AXES), parts=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_points_are_the_best_within_their_budgets(seed: int, axis: str, parts: list[float]) -> None:
    table = random_table(seed, count=3)
    ends = default_limits(table, axis)
    limits = sorted({ends[0] + part * (ends[-1] - ends[0]) for part in parts})
    exact, fast = frontier(table, axis, limits, Milp(relative_gap=1e-6)), frontier(table, axis, limits)
    best = {limit: brute_force(table, budget_at(axis, limit)) for limit in limits}
    for points in (exact, fast):
        for point in points:
            assert not point.allocation.budget.exceeded(point.allocation.usage)
            assert point.loss >= best[point.limit] * (1 - 1e-9) - 1e-12
        assert all(here.loss > there.loss for here, there in itertools.pairwise(points))
    for point in exact:
        assert point.loss == pytest.approx(best[point.limit], rel=1e-5, abs=1e-12)
    # What is left out buys nothing.
    for limit in limits:
        known = [point.loss for point in exact if point.limit <= limit]
        assert best[limit] >= min(known) * (1 - 1e-5) - 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, quantity=st.sampled_from(QUANTITIES))
def test_the_fast_frontier_is_exact_at_the_hulls_own_usages(seed: int, quantity: str) -> None:
    table = random_table(seed, count=3)
    limits = [float(usage) for usage in hull(table, quantity).usage if usage > 0]
    for point in frontier(table, quantity, limits):
        expected = brute_force(table, budget_at(quantity, point.limit))
        assert point.loss == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert point.allocation.solver == "hull"


def test_gain_and_price_of_a_tenth_of_a_bit() -> None:
    table = plain_table()
    points = frontier(table, "mean_weight_bits", [2, 4, 8])
    assert points[0].price is None
    assert points[-1].gain is None
    assert points[0].gain == points[1].price == pytest.approx(0.1 * (points[0].loss - points[1].loss) / 2)
    assert points[1].gain == pytest.approx(0.1 * (points[1].loss - points[2].loss) / 4)
    by_bytes = frontier(table, "weight_bytes", [100, 200, 400])
    assert step_of(table, "weight_bytes") == pytest.approx(400 * 0.1 / 8)
    assert by_bytes[0].gain == pytest.approx(points[0].gain), "the same budgets in other units"


def test_default_limits_reach_both_ends() -> None:
    table = plain_table()
    assert default_limits(table, "mean_bits") == [2 + 0.25 * index for index in range(25)]
    with pytest.raises(BudgetError, match="no times have been measured"):
        default_limits(table, "latency_ms")
    for axis in AXES[:-1]:
        points = frontier(table, axis)
        assert points[0].loss > points[-1].loss


@pytest.mark.parametrize(
    ("axis", "limits", "error", "text"),
    [
        ("bits", None, BudgetError, "mean_bits, mean_weight_bits"),
        ("mean_bits", [0], BudgetError, "positive"),
        ("mean_bits", [float("nan")], BudgetError, "positive"),
        ("mean_bits", [1], InfeasibleBudgetError, "minimum reachable 2"),
    ],
)
def test_mistakes_are_named(axis: str, limits: list[float] | None, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        frontier(plain_table(), axis, limits)


def test_means_over_layers() -> None:
    budget = Budget(mean_weight_bits=4, weight_mean="layers")
    found = hull(plain_table(), "mean_weight_bits", budget)
    assert found.usage[0] == 2
    assert found.usage[-1] == 8
