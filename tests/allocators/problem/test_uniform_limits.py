import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators.milp import Milp
from allocators.problem.budget import Budget
from allocators.problem.uniform_limits import in_numbers
from allocators.uniform import Uniform
from fxquant.errors import BudgetError, OverrideError
from tests.allocators.tables import plain_table, random_table


def test_parse_and_print():
    assert Budget.parse("MP4") == Budget(like_uniform_bits=4)
    assert str(Budget.parse("mp4, W3.5")) == "MP4, W3.5"
    assert Budget.parse(str(Budget.parse("MP6 A5"))) == Budget(like_uniform_bits=6, mean_activation_bits=5)
    for bad in ("MP", "MP0", "MP4.5", "MP4, MP3"):
        with pytest.raises(BudgetError):
            Budget.parse(bad)
    with pytest.raises(BudgetError, match="whole number"):
        Budget(like_uniform_bits=4.5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]))
def test_no_larger_and_no_dearer_than_uniform(seed, bits):
    table = random_table(seed)
    budget = in_numbers(Budget(like_uniform_bits=bits), table)
    uniform = table.usage(table.uniform(bits, bits))
    allocation = Milp().allocate(table, budget)
    for quantity in ("weight_bytes", "bit_operations"):
        assert allocation.usage[quantity] <= uniform[quantity] * (1 + 1e-9)
    assert allocation.objective <= table.objective(table.uniform(bits, bits)) * (1 + 1e-6) + 1e-12
    assert in_numbers(budget, table) == budget
    assert Budget.parse(str(budget)) == budget


def test_own_limits_stay_where_they_are_lower():
    table = plain_table()
    plain = in_numbers(Budget(like_uniform_bits=4), table)
    assert in_numbers(Budget(like_uniform_bits=4, weight_bytes=1e9), table) == plain
    assert in_numbers(Budget(like_uniform_bits=4, weight_bytes=150), table).weight_bytes == 150
    assert in_numbers(Budget(weight_bytes=150), table) == Budget(weight_bytes=150)


def test_uniform_itself():
    table = plain_table()
    budget = Budget.parse("MP4")
    allocation = Uniform().allocate(table, in_numbers(budget, table))
    assert set(allocation.weight_bits.values()) == {4}


def test_errors():
    with pytest.raises(BudgetError, match="follow from a cost table"):
        Milp().allocate(plain_table(), Budget.parse("MP4"))
    with pytest.raises(OverrideError, match="MP5 asks for a uniform model of 5 bits"):
        in_numbers(Budget.parse("MP5"), plain_table())
