import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators.problem.budget import Budget
from fxquant.errors import BudgetError

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, {"mean_weight_bits": 4, "mean_activation_bits": 4}),
        (3.5, {"mean_weight_bits": 3.5, "mean_activation_bits": 3.5}),
        ("4", {"mean_weight_bits": 4, "mean_activation_bits": 4}),
        ("W4A4", {"mean_weight_bits": 4, "mean_activation_bits": 4}),
        ("w3.5a5", {"mean_weight_bits": 3.5, "mean_activation_bits": 5}),
        (" A6 ", {"mean_activation_bits": 6}),
        ("W4", {"mean_weight_bits": 4}),
        ("6MB", {"weight_bytes": 6e6}),
        ("512KB", {"weight_bytes": 512e3}),
        ("1.5MiB", {"weight_bytes": 1.5 * 2**20}),
        ("300000B", {"weight_bytes": 300000}),
        ("6 mb", {"weight_bytes": 6e6}),
        ("2.1GBOPs", {"bit_operations": 2.1e9}),
        ("300mbops", {"bit_operations": 300e6}),
        ("5BOP", {"bit_operations": 5}),
        ("W4A4, 6MB", {"mean_weight_bits": 4, "mean_activation_bits": 4, "weight_bytes": 6e6}),
        ("W4 A5", {"mean_weight_bits": 4, "mean_activation_bits": 5}),
        ("6MB+2GBOPs+A4", {"weight_bytes": 6e6, "bit_operations": 2e9, "mean_activation_bits": 4}),
        ("W4/layers A4/elements", {"mean_weight_bits": 4, "mean_activation_bits": 4, "weight_mean": "layers"}),
        ("5ms", {"latency_ms": 5}),
        ("W4A8, 2.5 MS", {"mean_weight_bits": 4, "mean_activation_bits": 8, "latency_ms": 2.5}),
        ({"weight_bytes": 5}, {"weight_bytes": 5}),
    ],
)
def test_parse(value, expected):
    assert Budget.parse(value) == Budget(**expected)


def test_parse_returns_a_budget_unchanged():
    budget = Budget(weight_bytes=5)
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "empty"),
        ("W", "cannot read 'W'"),
        ("W4A4, lots", "cannot read 'lots'"),
        ("W4W5", "twice"),
        ("4 6MB", "cannot read '4 6MB'"),
        ("-4", "cannot read"),
        ("W0", "positive"),
        (0, "positive"),
        (-1.0, "positive"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        (True, "must be a number"),
        (None, "must be a number|at least one"),
        ([4], "must be a number"),
        ({}, "at least one"),
        ({"weight_byte": 4}, "did you mean 'weight_bytes'"),
        ({"weight_bytes": "4"}, "must be a number"),
        ({"mean_weight_bits": 4, "weight_mean": "median"}, "'elements' or 'layers'"),
        ({"weight_bytes": 4, "weight_mean": "layers"}, "not set"),
    ],
)
def test_parse_errors(value, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(value)


def test_str_is_short():
    assert str(Budget.parse("w4.0a4 , 6000000B")) == "W4A4, 6MB"
    assert str(Budget.parse("300000000bops W3.5/LAYERS")) == "W3.5/layers, 300MBOPs"


amounts = st.none() | st.floats(1e-3, 1e15)


@given(amounts, amounts, amounts, amounts, amounts, st.booleans(), st.booleans())
def test_str_and_dict_round_trip(weight, activation, size, operations, latency, weight_layers, activation_layers):
    values = (weight, activation, size, operations, latency)
    if values == (None,) * 5:
        return
    budget = Budget(
        mean_weight_bits=weight,
        mean_activation_bits=activation,
        weight_bytes=size,
        bit_operations=operations,
        latency_ms=latency,
        weight_mean="layers" if weight_layers and weight else "elements",
        activation_mean="layers" if activation_layers and activation else "elements",
    )
    assert Budget.parse(str(budget)) == budget
    assert Budget.from_dict(budget.to_dict()) == budget
