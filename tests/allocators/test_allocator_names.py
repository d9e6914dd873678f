"""Allocators by name: what ends in `ALLOCATOR = ...` is offered, under its module's name."""

from __future__ import annotations

import pytest

from allocators import ALLOCATORS, allocator_named
from allocators.milp import Milp
from fxquant.errors import BudgetError

pytestmark = pytest.mark.quick


def test_modules_that_end_in_an_allocator_are_offered() -> None:
    assert ALLOCATORS == ("greedy", "milp", "swaps", "uniform")
    assert allocator_named("milp") == Milp()


@pytest.mark.parametrize("name", ["quadratic", "problem", "os", ""])
def test_other_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(BudgetError, match=r"no allocator is called .*; there are greedy, milp, swaps, uniform"):
        allocator_named(name)
