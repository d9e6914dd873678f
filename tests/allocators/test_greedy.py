import numpy as np
import pytest

from allocators.greedy import Greedy
from allocators.problem.budget import Budget
from fxquant.errors import InfeasibleBudgetError
from tests.allocators.tables import budget_between, plain_table, random_table

pytestmark = pytest.mark.quick


def rescan(table, budget, metric, order):
    """Greedy MP by scanning every tensor at every step."""
    assignment = table.highest()

    def lower(tensors, quantities):
        def unmet():
            usage = table.usage(assignment, budget)
            return any(quantity in quantities for quantity in budget.exceeded(usage))

        while unmet():
            moves = []
            for row, layer in np.argwhere(tensors):
                side = table.sides[row]
                below = [column for column in side.columns(layer) if column < assignment[row, layer]]
                if not below or (quantities == ["bit_operations"] and table.macs[layer] == 0):
                    continue
                alpha = side.sqnr_db[layer, below[-1]]
                if metric == "sqnr-numel":
                    alpha *= np.log(side.elements[layer] * (1 if table.is_weight[row, layer] else 32))
                moves.append((-alpha, row, layer, below[-1]))
            _, row, layer, column = min(moves)
            assignment[row, layer] = column

    weights = table.is_weight
    phases = [(weights, ["mean_weight_bits", "weight_bytes"]), (~weights, ["mean_activation_bits"])]
    if order == "activations-first":
        phases.reverse()
    for tensors, quantities in [*phases, (weights | ~weights, ["bit_operations"])]:
        lower(tensors, quantities)
    return assignment


@pytest.mark.parametrize("metric", ["sqnr-numel", "sqnr"])
@pytest.mark.parametrize("order", ["weights-first", "activations-first"])
@pytest.mark.parametrize("seed", range(5))
def test_heap_equals_rescan(metric, order, seed):
    table = random_table(seed, count=9, bits=(2, 3, 4, 5, 6, 7, 8))
    parts = {"mean_weight_bits": 0.6, "mean_activation_bits": 0.4, "weight_bytes": 0.5, "bit_operations": 0.1}
    budget = budget_between(table, parts)
    np.testing.assert_array_equal(
        Greedy(metric, order).assign(table, budget), rescan(table, budget, metric, order), strict=True
    )


def test_free_quantities_stay_at_the_widest():
    allocation = Greedy().allocate(plain_table(), Budget(mean_weight_bits=4))
    assert set(allocation.activation_bits.values()) == {8}
    assert set(Greedy().allocate(plain_table(), Budget(mean_activation_bits=4)).weight_bits.values()) == {8}


def test_largest_alpha_goes_first_and_ties_go_to_the_earlier_layer():
    table = plain_table(first_elements=[300, 0, 300])
    allocation = Greedy().allocate(table, Budget(mean_weight_bits=6))
    assert allocation.weight_bits == {"blocks.0.fc1": 4, "head": 8}
    assert (allocation.status, allocation.gap, allocation.solver) == ("heuristic", None, "greedy")


def test_the_logarithm_changes_the_choice():
    table = plain_table(first_sqnr_db=np.outer([1.05, 1.0, 1.0], [12.0, 24.0, 48.0]))
    budget = Budget(mean_weight_bits=7.5)
    assert Greedy("sqnr").allocate(table, budget).weight_bits["blocks.0.fc1"] < 8
    assert Greedy("sqnr-numel").allocate(table, budget).weight_bits["head"] < 8


def test_an_activation_is_counted_over_all_images():
    """Twice the SQNR is worth less than log 2000 / log 20, and more than that ratio of 32 images."""
    table = plain_table(second_elements=[20, 0, 2000], second_sqnr_db=np.outer([2.0, 1.0, 1.0], [12.0, 24.0, 48.0]))
    budget = Budget(mean_activation_bits=7.9)
    assert Greedy(images=1).allocate(table, budget).activation_bits["head"] < 8
    assert Greedy().allocate(table, budget).activation_bits["blocks.0.fc1"] < 8


def test_minimum_bits_floors_every_tensor_but_pinned_ones():
    table = plain_table().override({"head": (2, None)})
    allocation = Greedy(minimum_bits=4).allocate(table, Budget(mean_weight_bits=2.5, mean_activation_bits=4))
    assert allocation.weight_bits == {"blocks.0.fc1": 4, "head": 2}
    assert set(allocation.activation_bits.values()) == {4}
    with pytest.raises(InfeasibleBudgetError, match=r"blocks\.0\.fc1"):
        Greedy(minimum_bits=4).allocate(table, Budget(mean_weight_bits=2.2))


def test_infinite_sqnr_of_a_single_element():
    table = plain_table(first_sqnr_db=np.full((3, 3), np.inf), first_elements=[1, 0, 1])
    assert Greedy().allocate(table, Budget(mean_weight_bits=2)).usage["mean_weight_bits"] == 2
