from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.quantizers.statistics.gram import BLOCK, Gram


def rows_of(columns: int, seed: int = 0, rows: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator), torch.rand(rows, generator=generator)


@pytest.mark.parametrize("columns", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 40])
def test_it_is_the_weighted_sum_over_rows(columns: int) -> None:
    gram, wanted = Gram(columns), torch.zeros(columns, columns, dtype=torch.float64)
    for seed in (0, 1):
        rows, weight = rows_of(columns, seed)
        gram.add(rows, weight)
        wanted += (rows * weight[:, None]).double().T @ rows.double()
    assert torch.allclose(gram.matrix().double(), wanted, atol=1e-4)
    assert torch.equal(gram.matrix(), gram.matrix().T)


def test_one_triangle_is_kept() -> None:
    columns = 8 * BLOCK
    assert sum(block.numel() for block in Gram(columns).state().values()) < 0.6 * columns**2


def test_a_state_is_gone_back_to() -> None:
    gram, rows = Gram(BLOCK + 3), rows_of(BLOCK + 3)
    gram.add(*rows)
    resumed = Gram()
    resumed.restore({name: block.clone() for name, block in gram.state().items()})
    before = resumed.matrix()
    gram.add(*rows)
    assert torch.equal(resumed.matrix(), before)


def test_two_are_merged_into_one() -> None:
    first, second = Gram(BLOCK + 3), Gram(BLOCK + 3)
    first.add(*rows_of(BLOCK + 3))
    second.add(*rows_of(BLOCK + 3))
    expected = first.matrix() + second.matrix()
    first.merge(second.state())
    assert torch.equal(first.matrix(), expected)


def test_rows_that_are_added_change_it_as_merging_what_they_give_does() -> None:
    columns, rows = 40, (rows_of(40, 0, 1000), rows_of(40, 1, 1000))
    added, merged, second = (Gram(columns) for _ in range(3))
    added.add(*rows[0])
    merged.add(*rows[0])
    added.add(*rows[1])
    second.add(*rows[1])
    merged.merge(second.state())
    assert torch.equal(added.matrix(), merged.matrix())


def test_of_a_matrix_a_copy_is_kept() -> None:
    gram = Gram(BLOCK + 3, torch.float64)
    rows, weight = rows_of(BLOCK + 3)
    gram.add(rows.double(), weight.double())
    whole = gram.matrix()
    again = Gram.of(whole)
    whole.zero_()
    assert torch.equal(again.matrix(), gram.matrix())
