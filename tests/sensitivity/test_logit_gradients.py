"""Gradients of the divergence: unbiased, of the image and not of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxquant.sensitivity.logit_gradients import logit_gradients

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("fisher", ["signs", "sampled"])
def test_fisher_estimators_are_unbiased(fisher: Any) -> None:
    """Mean of v v^T is diag(p) - p p^T."""
    p = torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01])
    v = logit_gradients(p[None], fisher, 200_000, seed=0)[:, 0].double()
    found = v.T @ v / len(v)
    expected = torch.diag(p).double() - torch.outer(p, p).double()
    assert torch.allclose(found, expected, atol=4e-3)
    assert float(v.sum(1).abs().max()) < 1e-5, "shifting all logits changes nothing"


def test_arg_max_takes_the_prediction() -> None:
    p = torch.tensor([[0.6, 0.4], [0.1, 0.9]])
    found = logit_gradients(p, "arg-max", 1, seed=0)
    assert torch.allclose(found, torch.tensor([[[-0.4, 0.4], [0.1, -0.1]]]))


def test_draws_follow_the_image_not_the_batch() -> None:
    p = torch.rand(6, 5).softmax(1)
    whole = logit_gradients(p, "signs", 4, seed=3)
    parts = [logit_gradients(p[:4], "signs", 4, seed=3), logit_gradients(p[4:], "signs", 4, seed=3, first=4)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert not torch.equal(whole, logit_gradients(p, "signs", 4, seed=4))
