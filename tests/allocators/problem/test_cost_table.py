import json

import numpy as np
import pytest

from allocators.milp import Milp
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from fxquant.errors import ArtefactError, BudgetError, InfeasibleBudgetError, OverrideError, SensitivityError
from tests.allocators.tables import plain_table, random_table, untied_table

pytestmark = pytest.mark.quick


def test_usage_of_a_uniform_assignment():
    table = plain_table()
    usage = table.usage(table.uniform(4, 8))
    assert usage == {
        "mean_weight_bits": 4.0,
        "mean_activation_bits": 8.0,
        "weight_bytes": 200.0,
        "bit_operations": 10 * 4 * 8 + 20 * 8 * 8 + 30 * 4 * 8,
    }


def test_float_operands_count_32_bits():
    table = plain_table(second_elements=[0, 0, 200], first_elements=[100, 0, 0])
    assert table.usage(table.uniform(4, 8))["bit_operations"] == 10 * 4 * 32 + 20 * 32 * 32 + 30 * 32 * 8


def test_means_by_elements_and_by_layers():
    table = plain_table().override({"head": 8}).override({"blocks*": 2})
    assignment = table.lowest()
    assert table.usage(assignment)["mean_weight_bits"] == (100 * 2 + 300 * 8) / 400
    assert table.usage(assignment)["mean_activation_bits"] == (200 * 2 + 200 * 8) / 400
    by_layer = Budget(mean_weight_bits=4, mean_activation_bits=4, weight_mean="layers", activation_mean="layers")
    usage = table.usage(assignment, by_layer)
    assert (usage["mean_weight_bits"], usage["mean_activation_bits"]) == (5.0, 4.0)


def test_choices_agree_with_usage_and_objective():
    table = random_table(3, count=7)
    budget = Budget(mean_weight_bits=4, mean_activation_bits=4, activation_mean="layers")
    assignment = table.uniform(4, 4)
    choices = [table.choices(layer, budget) for layer in range(7)]
    picks = [
        np.flatnonzero((pairs.columns == assignment[:, [layer]]).all(axis=0))[0] for layer, pairs in enumerate(choices)
    ]
    usage = sum(pairs.usage[:, pick] for pairs, pick in zip(choices, picks, strict=True))
    np.testing.assert_allclose(usage, list(table.usage(assignment, budget).values()), rtol=1e-12)
    cost = sum(pairs.cost[pick] for pairs, pick in zip(choices, picks, strict=True))
    assert cost == pytest.approx(table.objective(assignment))


def test_uniform_takes_the_nearest_allowed_width_and_the_lower_of_two():
    table = plain_table().override({"head": (8, None)})
    assert table.widths(table.uniform(4, 6)).tolist() == [[4, 0, 8], [4, 4, 4]]


def test_arrays_are_copied_and_read_only():
    macs = np.array([1, 2, 3])
    table = plain_table(macs=macs)
    macs[0] = 9
    assert table.macs[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        table.macs[0] = 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize(("row", "place"), [(0, "weight"), (1, "activation")])
def test_a_bad_cost_names_operand_layer_and_width(row, place, bad):
    cost = np.ones((2, 3, 3))
    cost[row, 2, 1] = bad
    with pytest.raises(SensitivityError, match=f"{place} cost of layer 'head' at 4 bits is {bad}"):
        plain_table(cost=cost)


def test_a_nan_sqnr_is_named_and_an_infinite_one_accepted():
    sqnr_db = np.full((3, 3), np.inf)
    plain_table(first_sqnr_db=sqnr_db)
    sqnr_db[0, 0] = np.nan
    with pytest.raises(SensitivityError, match=r"weight sqnr_db of layer 'blocks\.0\.fc1' at 2 bits is nan"):
        plain_table(first_sqnr_db=sqnr_db)


def test_entries_of_absent_operands_are_ignored():
    cost = np.ones((3, 3))
    cost[1] = np.nan
    table = plain_table(first_cost=cost, first_allowed=np.array([[1, 1, 1], [0, 0, 0], [1, 1, 1]]))
    assert np.isfinite(table.objective(table.highest()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"macs": [1, 2]}, r"macs must have shape \(3,\), found \(2,\)"),
        ({"cost": np.ones((2, 3, 2))}, "cost must have shape"),
        ({"cost": "x"}, "cost cannot be read"),
        ({"macs": [1, 2, -3]}, "macs of layer 'head' is negative"),
        ({"elements": [[1, 0, -1], [1, 1, 1]]}, "elements of layer 'head' is negative"),
        ({"bits": (2, 8, 4)}, "ascending"),
        ({"bits": (0, 4, 8)}, "positive"),
        ({"tied": [True, False, False]}, "tied are products of two inputs"),
        ({"layers": ("a", "a", "b")}, "every layer name once"),
        ({"roles": ("fc1",)}, "roles must have one entry per layer"),
    ],
)
def test_malformed_tables(changes, message):
    with pytest.raises(SensitivityError, match=message):
        plain_table(**changes)


def test_a_layer_without_allowed_width_is_named():
    allowed = np.ones((3, 3), bool)
    allowed[2] = False
    with pytest.raises(OverrideError, match=r"'head' is left without any allowed activation width.*\[2, 4, 8\]"):
        plain_table(second_allowed=allowed)


def test_infeasible_names_minimum_and_pinning_layers():
    table = plain_table().override({"head": 8, "blocks.0.fc1": (4, None)})
    with pytest.raises(InfeasibleBudgetError) as caught:
        table.check_feasible(Budget(mean_weight_bits=7, mean_activation_bits=3, weight_bytes=100))
    message = str(caught.value)
    assert "mean_weight_bits" not in message
    assert "mean_activation_bits 3 is below the minimum reachable 5, pinned by head (W8A8, +3)" in message
    assert "weight_bytes 100 is below the minimum reachable 350, pinned by head (W8A8, +225), blocks.0.fc1" in message


def test_infeasible_without_pins_says_the_candidates_are_too_wide():
    with pytest.raises(InfeasibleBudgetError, match=r"minimum reachable 2, with every layer at the lowest.*W2A2"):
        plain_table().check_feasible(Budget(mean_weight_bits=1.5))


def test_infeasible_names_at_most_five_layers():
    table = random_table(0, count=30, masked=False).override({"*": 8})
    with pytest.raises(InfeasibleBudgetError, match="and 25 more"):
        table.check_feasible(Budget(mean_activation_bits=4))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"head": 8}, [[2, 0, 8], [2, 2, 8]]),
        ({"blocks.*": 4}, [[4, 0, 2], [4, 4, 2]]),
        ({"qk": 8}, [[2, 0, 2], [2, 8, 2]]),
        ({"head": (8, None)}, [[2, 0, 8], [2, 2, 2]]),
        ({"head": (None, 4)}, [[2, 0, 2], [2, 2, 4]]),
        ({"*": 4, "head": 8}, [[4, 0, 8], [4, 4, 8]]),
        ({"head": 8, "*": 4}, [[4, 0, 4], [4, 4, 4]]),
    ],
)
def test_override(patterns, expected):
    table = plain_table()
    restricted = table.override(patterns)
    assert restricted.widths(restricted.lowest()).tolist() == expected
    assert table.allowed.all()


def test_an_override_wins_over_a_policy():
    table = plain_table().override({"head": 8})
    assert table.override({"head": 4}).widths(table.override({"head": 4}).lowest())[:, 2].tolist() == [4, 4]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"haed": 8}, "matches no layer, role or glob; close names: head"),
        ({"stages.*": 8}, "matches no layer"),
        ({"head": 5}, r"asks for 5 weight bits; the candidates are \[2, 4, 8\]"),
        ({"head": (None, 3)}, r"asks for 3 activation bits; the candidates are \[2, 4, 8\]"),
        ({"head": True}, "asks for True"),
        ({"qk": (4, 4)}, "no matched layer has weights"),
        ({"head": (4, 4, 4)}, r"\(weight bits, activation bits\)"),
    ],
)
def test_override_errors(patterns, message):
    with pytest.raises(OverrideError, match=message):
        plain_table().override(patterns)


def test_tied_choices_need_a_common_width():
    allowed = np.ones((3, 3), bool)
    allowed[2] = [True, True, False]
    table = plain_table(first_allowed=allowed).override({"head": (None, 8)})
    with pytest.raises(OverrideError, match="'head' has no width allowed for both"):
        table.lowest(tied=True)


def test_pinned_layers_are_not_tied():
    table = plain_table().override({"head": (8, 4)})
    assert table.widths(table.lowest(tied=True))[:, 2].tolist() == [8, 4]
    assert Milp(tie_weights_and_activations=True).allocate(table, Budget.parse("W8A8")).activation_bits["head"] == 4


def test_json_round_trip():
    table = random_table(5, count=6)
    assert CostTable.from_dict(json.loads(json.dumps(table.to_dict()))).to_dict() == table.to_dict()


def test_from_dict_names_missing_and_unknown_fields():
    values = plain_table().to_dict()
    values["mac"] = values.pop("macs")
    with pytest.raises(ArtefactError, match=r"\['mac', 'macs'\]"):
        CostTable.from_dict(values)


class TestProductsOfTwoWidths:
    """`untied_table`: the product has 60 left and 90 right elements and 20 multiply-accumulates."""

    def test_bit_operations_are_macs_times_both_widths(self):
        table = untied_table()
        assignment = np.array([[1, 0, 1], [1, 2, 1]])
        usage = table.usage(assignment)
        assert usage["bit_operations"] == 10 * 4 * 4 + 20 * 2 * 8 + 30 * 4 * 4
        assert usage["mean_activation_bits"] == (50 * 4 + 60 * 2 + 90 * 8 + 200 * 4) / 400
        assert usage["mean_weight_bits"] == 4
        assert usage["weight_bytes"] == 200

    def test_equal_widths_use_what_tied_ones_use(self):
        free, tied = untied_table(), plain_table()
        assert free.usage(free.uniform(4, 8)) == tied.usage(tied.uniform(4, 8))
        assert free.objective(free.uniform(4, 8)) == tied.objective(tied.uniform(4, 8))

    def test_names_of_operands(self):
        table = untied_table()
        assert [table.operand(row, 1) for row in (0, 1)] == ["blocks.0.qk.left", "blocks.0.qk.right"]
        assert [table.operand(row, 0) for row in (0, 1)] == ["blocks.0.fc1", "blocks.0.fc1"]
        assert plain_table().operand(1, 1) == "blocks.0.qk"
        allocation = Milp().allocate(table, Budget.parse("W8A4"))
        assert set(allocation.activation_bits) == {"blocks.0.fc1", "blocks.0.qk.left", "blocks.0.qk.right", "head"}
        assert table.objective(allocation.assignment(table)) == allocation.objective

    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
            ({"blocks.0.qk": 8}, [8, 8]),
            ({"qk": (None, 4)}, [4, 4]),
            ({"blocks.0.qk.left": 4}, [4, 2]),
            ({"qk.right": 8}, [2, 8]),
            ({"*.qk.left": 8, "qk.right": 4}, [8, 4]),
            ({"qk": 8, "qk.left": 4}, [4, 8]),
        ],
    )
    def test_override(self, patterns, expected):
        restricted = untied_table().override(patterns)
        assert restricted.widths(restricted.lowest())[:, 1].tolist() == expected

    @pytest.mark.parametrize(
        ("patterns", "message"),
        [
            ({"qk.left": 5}, r"asks for 5 left bits; the candidates are \[2, 4, 8\]"),
            ({"qk.left": (4, 4)}, "names one operand and must give one width"),
            ({"head.left": 4}, "'head', which has no width of its own"),
            ({"qk.middle": 4}, r'names no operand of .*one input of a product is named "qk\.left"'),
            ({"av.left": 4}, "matches no layer, role or glob; close names: .*qk.*left"),
            ({"qk": (4, None)}, "no matched layer has weights"),
        ],
    )
    def test_override_errors(self, patterns, message):
        with pytest.raises(OverrideError, match=message):
            untied_table().override(patterns)

    def test_a_tied_product_has_no_left_width(self):
        with pytest.raises(OverrideError, match=r"'blocks\.0\.qk', which has no width of its own"):
            plain_table().override({"qk.left": 4})

    def test_spared_operands_may_be_narrower(self):
        table = untied_table().at_least(4, ("qk.left",))
        assert table.widths(table.lowest()).tolist() == [[4, 2, 4], [4, 4, 4]]

    def test_weights_and_activations_are_tied_in_layers_with_weights_only(self):
        table = untied_table()
        assert len(table.choices(1, tied=True).cost) == 9
        assert len(table.choices(0, tied=True).cost) == 3

    def test_refusals_name_both_widths(self):
        with pytest.raises(InfeasibleBudgetError, match=r"pinned by blocks\.0\.qk \(L8R4, \+"):
            untied_table().override({"qk.left": 8, "qk.right": 4}).check_feasible(Budget(mean_activation_bits=2.1))


def test_a_width_that_is_no_candidate_is_refused():
    allocation = Milp().allocate(plain_table(), Budget.parse("W8A8"))
    with pytest.raises(BudgetError, match=r"'blocks.0.fc1' is given 8 bits; candidates are \(2, 3, 4\)"):
        allocation.assignment(plain_table(bits=(2, 3, 4)))
