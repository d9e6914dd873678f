from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.quantizers.search import search_weight
from fxquant.quantizers.statistics.low_rank import RANK, LowRank


def gram_of(columns: int, decay: float = 0.02) -> Tensor:
    """A Gram matrix of full rank whose eigenvalues fall off as those of a ViT's layers do."""
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(2 * columns, columns, generator=generator) * torch.exp(-decay * torch.arange(columns))
    mixed = rows @ torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    return mixed.T @ mixed


def exact(error: Tensor, gram: Tensor) -> Tensor:
    return ((error.double() @ gram.double()) * error).sum(1)


def test_up_to_its_rank_a_gram_matrix_is_kept_exactly() -> None:
    gram, error = gram_of(RANK), torch.randn(10, RANK, generator=torch.Generator().manual_seed(1))
    wanted = exact(error, gram)
    assert torch.allclose(LowRank.of(gram).cost(error).double(), wanted, rtol=1e-4)


def test_what_is_left_is_positive_and_the_trace_is_kept() -> None:
    gram = gram_of(3 * RANK)
    found = LowRank.of(gram)
    assert found.factor_ir.shape[1] <= RANK
    assert (found.rest_i >= 0).all()
    assert float(found.factor_ir.square().sum() + found.rest_i.sum()) == pytest.approx(float(gram.trace()), rel=1e-5)


def test_directions_that_hold_next_to_nothing_are_left_to_the_diagonal() -> None:
    assert LowRank.of(gram_of(2 * RANK, decay=0.2)).factor_ir.shape[1] < RANK / 4


def test_weaker_directions_are_left_to_the_diagonal_where_fewer_are_asked_for() -> None:
    found = LowRank.of(gram_of(2 * RANK))
    fewer = found.strongest(16)
    assert fewer.factor_ir.shape[1] == 16
    assert float(fewer.factor_ir.square().sum(0).min()) >= float(found.factor_ir[:, :-16].square().sum(0).max())
    diagonals = [seen.factor_ir.square().sum(1) + seen.rest_i for seen in (found, fewer)]
    assert torch.allclose(*diagonals, rtol=1e-5)
    assert found.strongest(RANK) is found


def test_no_error_costs_anything_where_the_loss_does_not_depend_on_the_layer() -> None:
    assert not LowRank.of(torch.zeros(200, 200)).cost(torch.ones(3, 200)).any()


def test_predicted_losses_are_those_of_the_gram_matrix_itself() -> None:
    weight, gram = torch.randn(48, 320, generator=torch.Generator().manual_seed(2)), gram_of(320)
    for found in search_weight(weight, (2, 3, 4, 8), 1, gram):
        wanted = 0.5 * float(exact(found.quantizer(weight) - weight, gram).sum())
        assert found.loss == pytest.approx(wanted, rel=0.01)
