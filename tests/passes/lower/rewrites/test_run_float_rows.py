"""Norms and means that stay float run by kernels; those that the kernels do not compute stay torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.printer import format_graph
from fxquant.runtime.integer.float_rows import NormRows
from passes.lower.rewrite import MISSES
from passes.lower.rewrites.run_float_rows import RunFloatRows
from passes.pipeline.contract import PassContext
from tests.assertions import assert_rewrites
from tests.lowering import needs_kernels
from tests.models import images, scrambled, traced

pytestmark = needs_kernels


class Rows(nn.Module):
    """A norm over channels of a product, and a mean over some of the dimensions."""

    def __init__(self, shape: tuple[int, ...], dims: tuple[int, ...], keepdim: bool = False) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1)
        self.norm, self.dims, self.keepdim = nn.LayerNorm(shape), dims, keepdim

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mix(x).permute(0, 2, 3, 1)).mean(self.dims, keepdim=self.keepdim)


def test_a_norm_and_a_mean_over_tokens_are_run_by_kernels() -> None:
    model, x = scrambled(Rows((3,), (1, 2))), images(4, 40)
    graph_module = traced(model, x)
    assert_rewrites(graph_module, RunFloatRows(), "%average_mean = AverageRows(%norm)")
    assert isinstance(graph_module.get_submodule("norm"), NormRows)
    graph_module.recompile()
    with torch.inference_mode():
        assert torch.allclose(graph_module(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "stays", "reason"),
    [
        (Rows((40, 3), (1, 2)), "layer_norm", "the last dimension alone"),
        (Rows((3,), (2,)), "mean", "between batch and channels"),
        (Rows((3,), (1, 2, 3)), "mean", "between batch and channels"),
        (Rows((3,), (1, 2), keepdim=True), "mean", "between batch and channels"),
    ],
)
def test_what_the_kernels_do_not_compute_stays(model: nn.Module, stays: str, reason: str) -> None:
    graph_module, context = traced(scrambled(model), images(2, 40)), PassContext()
    RunFloatRows().apply(graph_module, context)
    assert stays in format_graph(graph_module)
    assert reason in context.journal.pending[MISSES][0]["reason"]


def test_rows_are_normed_as_they_are_in_double_precision() -> None:
    x, norm = 3 + torch.randn(7, 197, 50, generator=torch.Generator().manual_seed(0)), scrambled(nn.LayerNorm(50))
    with torch.inference_mode():
        normed = torch.ops.fxquant.norm(x, norm.weight, norm.bias, norm.eps)
        assert torch.allclose(normed.double(), norm.double()(x.double()), rtol=1e-5, atol=1e-5)
        assert torch.allclose(torch.ops.fxquant.mean(x).double(), x.double().mean(1), rtol=1e-7)
