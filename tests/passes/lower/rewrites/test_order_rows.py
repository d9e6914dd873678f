"""Orders of rows and chains against the same graphs without them, bit for bit and for any number of images.

Each model looks like Swin and is not quite: what a pattern takes for its own must compute the same as before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fxquant
from allocators.uniform import Uniform
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import QUANTIZED
from fxquant.graph.printer import format_graph
from passes.lower.lower import Lower
from passes.lower.rewrites.order_rows import OrderRows
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.recipes import RECIPES
from tests.lowering import lower, needs_kernels, quantized
from tests.models import ARCHITECTURES, images, scrambled

pytestmark = needs_kernels


CHANNELS = 8


class Attention(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS), heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """Windows of 4 x 4. kind: in what it differs from Swin's."""

    def __init__(self, kind: str, norm: int | tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        self.kind, self.attention = kind, Attention()
        self.norm1, self.norm2 = nn.LayerNorm(norm), nn.LayerNorm(CHANNELS)
        self.fc1, self.gelu, self.fc2 = nn.Linear(CHANNELS, 16), nn.GELU(), nn.Linear(16, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        normed = self.norm1(x)
        cut = normed.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5)
        sizes = (b * (h // 4) * (w // 4), 16, c)
        windows = torch.reshape(cut, sizes) if self.kind == "torch.reshape" else cut.reshape(-1, 16, c)
        y = self.attention(windows)
        count = y.shape[0] // ((h // 4) * (w // 4)) if self.kind == "size of windows" else b
        y = y.view(count, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(normed.shape) if self.kind == "shape of the norm" else y.reshape(count, h, w, c)
        total = torch.add(x, y, alpha=2) if self.kind == "twice the sum" else x + y
        if self.kind == "size of the norm":
            total = total * normed.shape[0]
        if self.kind == "residual read twice":
            total = total + x
        result: Tensor = total + self.fc2(self.gelu(self.fc1(self.norm2(total))))
        return result


class Windows(nn.Module):
    """One block between patch embedding and head; outer: on tokens that are in windows already."""

    def __init__(self, kind: str = "", norm: int | tuple[int, ...] = CHANNELS, outer: bool = False) -> None:
        super().__init__()
        self.patches, self.head, self.outer = nn.Conv2d(3, CHANNELS, 2, 2), nn.Linear(CHANNELS, 5), outer
        self.block = Block(kind, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        if self.outer:
            x = x.reshape(b, 2, h // 2, 2, w // 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, h // 2, w // 2, c)
        result: Tensor = self.head(self.block(x).reshape(b, -1, c).mean(1))
        return result


class FiveDimensions(nn.Module):
    """Attention in windows that keep a dimension of their own, as in NesT and Hiera."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, CHANNELS, 2, 2), nn.LayerNorm(CHANNELS)
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        x = x.reshape(b, 4, n // 4, c)
        qkv = self.qkv(self.norm(x)).reshape(b, 4, n // 4, 3, 2, c // 2).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv.unbind(0)
        y = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + self.proj(y.permute(0, 2, 3, 4, 1).reshape(b, 4, n // 4, c))
        result: Tensor = self.head(x.mean((1, 2)))
        return result


class Mlp(nn.Module):
    """Norm and MLP on patches in another layout, sizes (3, 16, 16): 16 patches."""

    def __init__(self, layout: str, patch: int = 4, merge: int = 1, channels: int = CHANNELS) -> None:
        super().__init__()
        self.layout, self.patches = layout, nn.Conv2d(3, channels, patch, patch)
        self.norm, self.fc1 = nn.LayerNorm(merge * channels), nn.Linear(merge * channels, 16)
        self.gelu, self.fc2, self.head = nn.GELU(), nn.Linear(16, channels), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        b, c, h, w = x.shape
        first = {
            "batch third": lambda: x.permute(2, 3, 0, 1) * 1.5,
            "batch second": lambda: x.flatten(2).permute(2, 0, 1) * 1.5,
            "one in front": lambda: x.permute(0, 2, 3, 1) * 1.5,
            "size in a tuple": lambda: torch.reshape(x.permute(0, 2, 3, 1), (b, -1, c)),
            "size times four": lambda: x.permute(0, 2, 3, 1).reshape(b * 4, -1, c),
            "one column": lambda: x.flatten(2).transpose(1, 2),
            "merged behind one": lambda: merged(x).reshape(b, -1, 4 * c).unsqueeze(0),
            "merged, batch second": lambda: merged(x).reshape(b, -1, 4 * c).transpose(0, 1),
        }[self.layout]()
        y = self.fc2(self.gelu(self.fc1(self.norm(first))))
        if self.layout == "batch third":
            return self.head(y.view(h * w, b, c).softmax(0).mean(0))
        if self.layout == "batch second":
            return self.head(y.view(h, w, b, c).softmax(0).mean((0, 1)))
        if self.layout == "one in front":
            return self.head(y.reshape(1, -1, c).softmax(2).view(b, -1, c).mean(1))
        if self.layout == "merged, batch second":
            return self.head(y.mean(0))
        return self.head(y.reshape(b, -1, c).mean(1))


def merged(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5)


KINDS = [
    "",
    "torch.reshape",
    "size of windows",
    "shape of the norm",
    "twice the sum",
    "size of the norm",
    "residual read twice",
]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    **{f"windows, {kind}": (partial(Windows, kind), (16, 16)) for kind in KINDS},
    "windows, not square": (Windows, (16, 24)),
    "one window": (Windows, (8, 8)),
    "five dimensions": (FiveDimensions, (16, 16)),
    "a norm over an image": (partial(Windows, norm=(8, 8, CHANNELS)), (16, 16)),
    "windows of windows": (partial(Windows, "size of the norm", outer=True), (32, 32)),
    "batch second": (partial(Mlp, "batch second"), (16, 16)),
    "batch third": (partial(Mlp, "batch third"), (16, 16)),
    "one in front": (partial(Mlp, "one in front"), (16, 16)),
    "size in a tuple": (partial(Mlp, "size in a tuple"), (16, 16)),
    "size times four": (partial(Mlp, "size times four"), (16, 16)),
    "one column": (partial(Mlp, "one column", 4, channels=384), (16, 4)),
    "merged behind one": (partial(Mlp, "merged behind one", merge=4), (16, 16)),
    "merged, batch second": (partial(Mlp, "merged, batch second", merge=4), (16, 16)),
}


@pytest.mark.parametrize("traced_with", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_what_looks_like_windows_computes_the_same(
    name: str, traced_with: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, (height, width) = MODELS[name]

    def draw(count: int, seed: int) -> Tensor:
        return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))

    graph_module = trace(scrambled(build().eval()), draw(traced_with, 1))
    AssignRoles().apply(graph_module, PassContext())
    recipe = RECIPES["mptq_vit"]("W4A6", bits=(4, 6), allocator=Uniform())
    graph_module = recipe.run(graph_module, PassContext(draw(2, 2)))
    apart, chained = lower(graph_module), lower(graph_module, chains=True)
    again = Pipeline([Lower("cpu-native")], assumes=[QUANTIZED]).run(chained, PassContext())
    assert format_graph(again) == format_graph(chained)
    monkeypatch.setattr(OrderRows, "apply", lambda *_: 0)
    as_traced = lower(graph_module)
    with torch.inference_mode():
        for count in (1, 2, 3, 5):
            x = draw(count, 3)
            expected = as_traced(x)
            assert torch.equal(apart(x), expected)
            assert torch.equal(chained(x), expected)


def test_models_in_float64_stay_as_they_are() -> None:
    model, size = ARCHITECTURES["swin"]()
    compiled = fxquant.compile(model.double(), "W8A8", calibration=images(4, size).double(), bits=(8,))
    x = images(3, size).double()
    with torch.inference_mode():
        assert torch.equal(compiled.lowered("cpu-native")(x), compiled(x))


def test_windows_are_ordered_once_for_a_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module, x = quantized("swin"), images(5, 32, seed=5)
    low = lower(copy.deepcopy(graph_module))
    text = format_graph(low)
    block = text[text.index("%windows_layers_0_blocks_1_norm1") : text.index("%layers_1_downsample_norm")]
    assert block == (
        "%windows_layers_0_blocks_1_norm1 = ReorderRows(%reshape_3)\n"
        "%layers_0_blocks_1_norm1 = layer_norm(%windows_layers_0_blocks_1_norm1)\n"
        "%layers_0_blocks_1_attn_qkv = qkv[w4a6](%layers_0_blocks_1_norm1)\n"
        "%layers_0_blocks_1_attn_integer_attention = IntegerAttention(%layers_0_blocks_1_attn_qkv)\n"
        "%layers_0_blocks_1_attn_proj = "
        "proj[w4a6](%layers_0_blocks_1_attn_integer_attention, %windows_layers_0_blocks_1_norm1)\n"
        "%image_layers_0_blocks_1_norm1 = ReorderRows(%layers_0_blocks_1_attn_proj)\n"
        "%reshape_6 = reshape(%image_layers_0_blocks_1_norm1, %getitem, -1, 12)\n"
        "%layers_0_blocks_1_norm2 = layer_norm(%reshape_6)\n"
        "%layers_0_blocks_1_mlp_fc1 = fc1[w4a6](%layers_0_blocks_1_norm2)\n"
        "%layers_0_blocks_1_mlp_fc2 = fc2[w4a6](%layers_0_blocks_1_mlp_fc1, %reshape_6)\n"
        "%merge_layers_1_downsample_norm = ReorderRows(%layers_0_blocks_1_mlp_fc2)\n"
    )
    assert "roll" not in text
    monkeypatch.setattr(OrderRows, "apply", lambda *_: 0)
    as_traced = lower(graph_module)
    assert "roll" in format_graph(as_traced)
    with torch.inference_mode():
        assert torch.equal(low(x), as_traced(x))
        assert torch.equal(low(x[:1]), as_traced(x[:1]))
