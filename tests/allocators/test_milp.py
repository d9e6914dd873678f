import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocators.allocator import Allocator
from allocators.greedy import Greedy
from allocators.milp import Milp
from allocators.problem.budget import QUANTITIES, Budget
from fxquant.errors import BudgetError, InfeasibleBudgetError, OverrideError
from tests.allocators.tables import brute_force, budget_between, plain_table, random_table

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 10_000)
parts = st.dictionaries(st.sampled_from(QUANTITIES), st.floats(0, 1.1), min_size=1)
means = st.sampled_from(["elements", "layers"])


def budget_of(table, fractions, weight_mean="elements", activation_mean="elements"):
    kept = {}
    if "mean_weight_bits" in fractions:
        kept["weight_mean"] = weight_mean
    if "mean_activation_bits" in fractions:
        kept["activation_mean"] = activation_mean
    return budget_between(table, fractions, **kept)


@few
@given(seeds, parts, means, means, st.floats(0, 12))
def test_optimal_within_budget_and_never_worse_than_greedy(seed, fractions, weight_mean, activation_mean, decades):
    table = random_table(seed, decades=decades)
    budget = budget_of(table, fractions, weight_mean, activation_mean)
    milp = Milp().allocate(table, budget)
    greedy = Greedy().allocate(table, budget)
    assert not budget.exceeded(milp.usage)
    assert not budget.exceeded(greedy.usage)
    assert milp.objective <= greedy.objective
    assert milp.status == "optimal"
    assert milp.objective == pytest.approx(brute_force(table, budget), rel=1e-6)


@few
@given(seeds, st.sampled_from(QUANTITIES), st.floats(0, 1), st.floats(0, 1))
def test_monotone_in_the_budget(seed, quantity, one, other):
    table = random_table(seed, count=6, bits=(2, 3, 4, 6, 8))
    tight, loose = (budget_of(table, {quantity: part}) for part in sorted((one, other)))
    assert Milp().allocate(table, loose).objective <= Milp().allocate(table, tight).objective * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_tied_widths_match_brute_force(seed):
    table = random_table(seed, masked=False)
    budget = budget_between(table, {"mean_weight_bits": 0.4, "bit_operations": 0.3})
    allocation = Milp(tie_weights_and_activations=True).allocate(table, budget)
    both = set(allocation.weight_bits) & set(allocation.activation_bits)
    assert both
    assert all(allocation.weight_bits[layer] == allocation.activation_bits[layer] for layer in both)
    assert not budget.exceeded(allocation.usage)
    assert allocation.objective == pytest.approx(brute_force(table, budget, tied=True), rel=1e-6)


def test_tied_without_a_common_width_names_the_layer():
    allowed = np.ones((3, 3), bool)
    allowed[2] = [True, True, False]
    table = plain_table(first_allowed=allowed).override({"head": (None, 8)})
    with pytest.raises(OverrideError, match="'head'"):
        Milp(tie_weights_and_activations=True).allocate(table, Budget(mean_weight_bits=8))


def test_whole_mean_bits_are_reached_exactly():
    table = random_table(1, count=8, masked=False)
    budget = Budget.parse("W4A4")
    allocation = Milp().allocate(table, budget)
    assert allocation.objective <= table.objective(table.uniform(4, 4))
    assert not budget.exceeded(allocation.usage)


def test_one_table_alone_under_every_constraint():
    table = random_table(2, count=5, masked=False)
    budget = budget_between(table, dict(zip(QUANTITIES, (0.5, 0.4, 0.3, 0.2, 0.5), strict=True)))
    allocation = Milp().allocate(table, budget)
    assert not budget.exceeded(allocation.usage)
    assert allocation.objective == pytest.approx(brute_force(table, budget), rel=1e-6)


def test_infeasible_is_raised_before_solving():
    with pytest.raises(InfeasibleBudgetError, match="minimum reachable 2"):
        Milp().allocate(plain_table(), Budget(mean_weight_bits=1))


def test_the_loosest_and_the_tightest_budget():
    table = plain_table()
    loose = Milp().allocate(table, Budget(mean_weight_bits=8, bit_operations=1e12))
    assert set(loose.weight_bits.values()) == {8}
    assert (loose.binding, loose.gap) == ((), 0.0)
    tight = Milp().allocate(table, Budget(mean_weight_bits=2))
    assert set(tight.weight_bits.values()) == {2}
    assert tight.binding == ("mean_weight_bits",)
    assert set(tight.activation_bits.values()) == {8}


def test_zero_costs_are_no_division():
    allocation = Milp().allocate(
        plain_table(first_cost=np.zeros((3, 3)), second_cost=np.zeros((3, 3))), Budget.parse(4)
    )
    assert (allocation.objective, allocation.gap, allocation.status) == (0.0, 0.0, "optimal")


def large_table():
    return random_table(7, count=96, bits=(2, 3, 4, 5, 6, 7, 8), decades=6, masked=False, tied=1.0)


def test_96_layers_are_quiet_and_deterministic(capfd):
    table = large_table()
    budget = budget_between(table, {"mean_weight_bits": 0.4, "bit_operations": 0.15})
    first = Milp().allocate(table, budget)
    assert first == Milp().allocate(table, budget)
    assert first.status == "optimal"
    assert first.objective < Greedy().allocate(table, budget).objective
    assert capfd.readouterr() == ("", "")


def test_out_of_time_returns_the_greedy_answer(capfd):
    table = large_table()
    budget = budget_between(table, {"mean_weight_bits": 0.4, "bit_operations": 0.15})
    allocation = Milp(time_limit_s=1e-6).allocate(table, budget)
    assert allocation.status == "feasible"
    assert allocation.gap is not None
    assert 0 < allocation.gap < 1
    assert allocation.objective <= Greedy().allocate(table, budget).objective
    assert not budget.exceeded(allocation.usage)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{"time_limit_s": 0}, {"relative_gap": -1}, {"threads": 0}])
def test_options_out_of_range(options):
    with pytest.raises(BudgetError, match="time_limit_s must be above 0"):
        Milp(**options)


def test_allocators_are_values_of_the_protocol():
    allocators: list[Allocator] = [Milp(), Greedy()]
    assert allocators == [Milp(), Greedy()]
