"""Positions and class tokens in one step, and what only looks like them left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from fxquant.graph.printer import format_graph
from passes.lower.rewrite import MISSES
from passes.lower.rewrites.assemble_tokens import AssembleTokens
from passes.pipeline.contract import PassContext
from tests.lowering import lower, needs_kernels, quantized
from tests.models import ARCHITECTURES, images


@needs_kernels
@pytest.mark.parametrize("architecture", ["vit", "deit distilled", "deit3", "vit, average pool and fc_norm", "swin"])
def test_tokens_are_assembled_in_one_step(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module, x = quantized(architecture), images(5, ARCHITECTURES[architecture]()[1], seed=5)
    low = lower(copy.deepcopy(graph_module))
    assert format_graph(low).count("AssembleTokens") == (architecture != "swin")
    monkeypatch.setattr(AssembleTokens, "apply", lambda *_: 0)
    with torch.inference_mode():
        assert torch.equal(low(x), lower(graph_module)(x))


class Positions(nn.Module):
    """Sums and joins that look like positions and class tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.positions, self.one = nn.Parameter(torch.randn(1, 4, 6)), nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        added = x + self.positions
        if self.kind == "read twice":
            return torch.cat([self.one.expand(x.shape[0], -1, -1), added], 1).sum(1) + added.sum(1)
        if self.kind == "behind":
            return torch.cat([x, self.one.expand(x.shape[0], -1, -1)], 1) * 2
        if self.kind == "another dimension":
            return torch.cat([self.one.expand(x.shape[0], 4, -1), added], 2)
        return torch.cat([self.one.expand(x.shape[0], -1, -1), x], 1) + 1.0


@needs_kernels
@pytest.mark.parametrize("kind", ["read twice", "behind", "another dimension", "a number"])
def test_what_only_looks_like_tokens_computes_the_same(kind: str) -> None:
    model, x = Positions(kind).eval(), torch.randn(3, 4, 6)
    graph_module = fx.symbolic_trace(model)
    ShapeProp(graph_module).propagate(x)
    context = PassContext()
    with torch.inference_mode():
        expected = model(x)
        AssembleTokens().apply(graph_module, context)
        graph_module.recompile()
        assert torch.equal(graph_module(x), expected)
    assert MISSES not in context.journal.pending, "none of these is nearly one"


@needs_kernels
def test_one_row_for_all_tokens_is_a_miss() -> None:
    class OneRow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.randn(1, 1, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.row

    graph_module, context = fx.symbolic_trace(OneRow()), PassContext()
    ShapeProp(graph_module).propagate(torch.randn(3, 4, 6))
    assert AssembleTokens().apply(graph_module, context) == 0
    (miss,) = context.journal.pending[MISSES]
    assert miss["layer"] == "add"
    assert "not one row of float32 for each token" in miss["reason"]
