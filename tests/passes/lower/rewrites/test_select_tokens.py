"""Selecting a token early: the same numbers, from layers that run on one token."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.capture.tracing import trace
from passes.lower.integer_plan import shape_of
from passes.lower.rewrites.select_tokens import SelectTokens
from passes.pipeline.contract import PassContext

pytestmark = pytest.mark.quick


class Head(nn.Module):
    """A residual stream, a norm, and a head that reads one token (or two, or the mean)."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads, self.norm, self.mix = reads, nn.LayerNorm(6), nn.Linear(4, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2)
        x = self.norm(x + self.mix(x.transpose(1, 2)).transpose(1, 2))
        if self.reads == "one":
            return x[:, 2]
        return x[:, 0] + x[:, 1] if self.reads == "two" else x.mean(1)


def selected(model: nn.Module, x: Tensor) -> tuple[GraphModule, int]:
    graph_module = copy.deepcopy(trace(model.eval(), x))
    moved = SelectTokens().apply(graph_module, PassContext())
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module, moved


def test_layers_that_treat_tokens_alike_run_on_one() -> None:
    torch.manual_seed(0)
    model, x = Head("one"), torch.randn(3, 6, 2, 2)
    graph_module, moved = selected(model, x)
    assert moved == 2  # the norm and the sum; not the layer that mixes tokens
    norm = next(node for node in graph_module.graph.nodes if node.target == "norm")
    assert shape_of(norm) == (1, 1, 6) or shape_of(norm) == (3, 1, 6)
    assert torch.equal(graph_module(x), model(x))


def test_what_reads_more_is_left_alone() -> None:
    torch.manual_seed(0)
    for reads in ("two", "mean"):
        model, x = Head(reads), torch.randn(3, 6, 2, 2)
        graph_module, moved = selected(model, x)
        assert moved == 0
        assert torch.equal(graph_module(x), model(x))


def test_a_vits_last_norm_runs_on_the_class_token() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    graph_module, moved = selected(model, x)
    assert moved >= 1
    torch.testing.assert_close(graph_module(x), model(x))
