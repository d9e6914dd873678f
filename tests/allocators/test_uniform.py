"""The Uniform allocator: widths from mean bits, and no budget that it does not look at."""

from __future__ import annotations

import pytest

from allocators.problem.budget import Budget
from allocators.uniform import Uniform
from fxquant.errors import BudgetError
from tests.allocators.tables import plain_table


def test_every_layer_has_the_mean_widths_and_what_is_pinned_keeps_its_own() -> None:
    allocation = Uniform().allocate(plain_table().override({"head": 8}), Budget.parse("W4A2"))
    assert allocation.weight_bits == {"blocks.0.fc1": 4, "head": 8}
    assert allocation.activation_bits == {"blocks.0.fc1": 2, "blocks.0.qk": 2, "head": 8}


@pytest.mark.parametrize(("text", "named"), [("W4A4, 199B", "weight_bytes"), ("W4A4, 959BOPs", "bit_operations")])
def test_a_limit_that_the_means_exceed_is_refused(text: str, named: str) -> None:
    """4 bits of 400 weights are 200 bytes; 60 multiply-accumulates of 4 by 4 bits are 960."""
    Uniform().allocate(plain_table(), Budget.parse("W4A4, 200B, 960BOPs"))
    with pytest.raises(BudgetError, match=f"exceeds its {named}: lower the mean bits"):
        Uniform().allocate(plain_table(), Budget.parse(text))


def test_no_width_follows_from_bytes_alone() -> None:
    with pytest.raises(BudgetError, match="Uniform needs mean bits"):
        Uniform().allocate(plain_table(), Budget.parse("6MB"))
