"""The share of multiply-accumulates that runs in float, counted from the graph, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant.errors import ArtefactError
from fxquant.graph.capture.tracing import trace
from fxquant.runtime.mac_shares import checked_shares, mac_shares, node_macs
from passes.recipes import naive_min_max
from tests.models import images


class Products(nn.Module):
    """One of each: convolutions, linear layers, products in several spellings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.qkv, self.both, self.head = nn.Linear(6, 18), nn.Bilinear(6, 6, 5), nn.Linear(5, 3)
        self.table = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(x)).flatten(2).transpose(1, 2)  # (B, 64, 6)
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = torch.einsum("bqc,bkc->bqk", q, k).softmax(-1)
        x = torch.bmm(scores, v)
        x = self.both(x, x).mean(1)
        return self.head(x + functional.linear(x, self.table))


def test_every_product_is_counted() -> None:
    graph_module = trace(Products().eval(), torch.randn(2, 4, 8, 8))
    counted = sorted(node_macs(graph_module).values())
    tokens = 64
    expected = {
        "grouped": 16 * 8 * 2 * 9, "up": 16 * 8 * 6 * 4, "qkv": tokens * 6 * 18, "einsum": tokens * tokens * 6,
        "bmm": tokens * tokens * 6, "bilinear": tokens * 5 * 36, "table": 25, "head": 15,
    }  # fmt: skip
    assert counted == sorted(expected.values())
    shares = mac_shares(graph_module)
    assert shares["total"] == sum(expected.values())
    assert shares["float_share"] == 1.0
    assert shares["largest_in_float"][0]["share"] == pytest.approx(tokens * tokens * 6 / shares["total"])


class EinsumAttention(nn.Module):
    """Attention that no pass knows, between layers that all are quantized."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(self.embed(x).flatten(2).transpose(1, 2))).chunk(3, -1)
        weights = torch.einsum("bqc,bkc->bqk", q, k).sigmoid()
        return self.head(torch.einsum("bqk,bkc->bqc", weights, v).mean(1))


def test_attention_in_float_is_reported_beside_layers_that_are_integers() -> None:
    recipe = naive_min_max("W8A8", bits=(8,))
    compiled = fxquant.compile(EinsumAttention(), None, calibration=images(2), recipe=recipe)
    shares = compiled.card["multiply_accumulates"]
    layers = 64 * 8 * (48 + 24) + 8 * 5
    assert shares["float_share"] == pytest.approx(1 - layers / shares["total"])
    assert shares["total"] == layers + 2 * 64 * 64 * 8
    lines = str(compiled.report()).splitlines()
    (line,) = [line for line in lines if line.strip().startswith("arithmetic")]
    assert f"{shares['float_share']:.1%} in float" in line
    assert shares["largest_in_float"][0]["node"] in line
    lowered = compiled.lowered("auto")
    found = lowered.card["multiply_accumulates"]
    assert found["integer_share"] + found["simulated_share"] + found["float_share"] == pytest.approx(1)
    assert lowered.card["execution"].endswith(f"{shares['float_share']:.1%} of all multiply-accumulates stay in float")
    assert f"{shares['float_share']:.1%} in float" in str(lowered.report())


@pytest.mark.parametrize("bad", [
    3, {"float_share": 2, "total": 1, "largest_in_float": []}, {"float_share": 0.5, "total": 1.5,
    "largest_in_float": []}, {"float_share": 0.5, "total": 2}, {"float_share": "x", "total": 2, "largest_in_float": []},
    {"float_share": 0.5, "total": 2, "largest_in_float": [{"node": 3, "share": 0.5}]},
])  # fmt: skip
def test_cards_of_another_shape(bad: Any) -> None:
    with pytest.raises(ArtefactError, match="multiply_accumulates"):
        checked_shares(bad)
    assert checked_shares(None) == checked_shares({}) == {}
