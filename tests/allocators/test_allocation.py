import json
from dataclasses import replace

import numpy as np
import pytest

from allocators.allocation import Allocation
from allocators.greedy import Greedy
from allocators.milp import Milp
from allocators.problem.budget import Budget
from fxquant.errors import ArtefactError
from tests.allocators.tables import budget_between, plain_table, random_table

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("allocator", [Greedy(), Milp()])
def test_json_round_trip(allocator):
    allocation = allocator.allocate(random_table(4, count=6, masked=False), Budget.parse("W4/layers A4, 1MB"))
    assert Allocation.from_json(allocation.to_json()) == allocation


def test_equality_ignores_seconds():
    allocation = Greedy().allocate(plain_table(), Budget.parse(4))
    assert replace(allocation, seconds=99.0) == allocation
    assert replace(allocation, objective=99.0) != allocation


def test_only_layers_that_have_the_operand_are_listed():
    allocation = Greedy().allocate(plain_table(second_elements=[0, 150, 200]), Budget.parse(4))
    assert list(allocation.weight_bits) == ["blocks.0.fc1", "head"]
    assert list(allocation.activation_bits) == ["blocks.0.qk", "head"]


def test_binding_names_the_quantities_no_step_fits_into():
    table = plain_table()
    allocation = Greedy().allocate(table, Budget(mean_weight_bits=4, mean_activation_bits=7.9, bit_operations=1e9))
    assert allocation.usage["mean_weight_bits"] <= 4
    assert allocation.binding == ("mean_weight_bits", "mean_activation_bits")


@pytest.mark.parametrize("seed", range(6))
def test_what_binds_is_what_single_upgrades_say(seed):
    table = random_table(seed, count=5)
    budget = budget_between(table, {"weight_bytes": 0.2, "bit_operations": 0.5, "mean_activation_bits": 0.9})
    allocation = Greedy().allocate(table, budget)
    assignment, usage = allocation.assignment(table), allocation.usage
    fits = {quantity: [] for quantity in budget.limits}
    for row, layer in np.ndindex(assignment.shape):
        wider = [column for column in table.sides[row].columns(layer) if column > assignment[row, layer]]
        if wider:
            upgraded = assignment.copy()
            upgraded[row, layer] = wider[0]
            raised = table.usage(upgraded, budget)
            for quantity in fits:
                if raised[quantity] > usage[quantity]:
                    fits[quantity].append(quantity not in budget.exceeded(raised))
    assert allocation.binding == tuple(q for q, fit in fits.items() if fit and not any(fit))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": {"head": 4.5}}, "bad field 'weight_bits'"),
        ({"activation_bits": [4]}, "bad field 'activation_bits'"),
        ({"objective": "low"}, "bad field 'objective'"),
        ({"objective": float("nan")}, "bad field 'objective'"),
        ({"usage": {}}, "bad field 'usage'"),
        ({"budget": {}}, "bad field 'budget'"),
        ({"budget": 4}, "bad field 'budget'"),
        ({"status": "perfect"}, "bad field 'status'"),
        ({"status": []}, "bad field 'status'"),
        ({"gap": -1}, "bad field 'gap'"),
        ({"binding": ["latency"]}, "bad field 'binding'"),
        ({"solver": 3}, "bad field 'solver'"),
        ({"extra": 1}, "object with the fields"),
    ],
)
def test_malformed_json_names_the_field(changes, message):
    values = json.loads(Greedy().allocate(plain_table(), Budget.parse(4)).to_json())
    with pytest.raises(ArtefactError, match=message):
        Allocation.from_json(json.dumps(values | changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "4"])
def test_not_an_allocation(text):
    with pytest.raises(ArtefactError, match="not an allocation"):
        Allocation.from_json(text)
