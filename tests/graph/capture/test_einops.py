"""einops inside a model, in all its spellings."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import nn

from fxquant.graph.annotation import Role, annotation_of
from fxquant.graph.capture.tracing import trace
from tests.models import images, scrambled, traced

einops = pytest.importorskip("einops")
layers = pytest.importorskip("einops.layers.torch")

IMAGES = images(2, 16)


class Block(nn.Module):
    """vit-pytorch's attention and MLP."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm, self.to_qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x):
        q, k, v = (
            einops.rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.to_qkv(self.norm(x)).chunk(3, -1)
        )
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        out = torch.matmul(dots.softmax(-1), v)
        x = x + self.to_out(einops.rearrange(out, "b h n d -> b n (h d)"))
        return x + self.net(x)


class ViT(nn.Module):
    """vit-pytorch's Vision Transformer: patches, class token and positions by einops."""

    def __init__(self) -> None:
        super().__init__()
        patches = layers.Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=4, p2=4)
        self.embed = nn.Sequential(patches, nn.LayerNorm(48), nn.Linear(48, 12))
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 17, 12))
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(12, 5)

    def forward(self, image):
        x = self.embed(image)
        token = einops.repeat(self.token, "1 1 d -> b 1 d", b=x.shape[0])
        x = torch.cat([token, x], 1) + self.position
        return self.head(einops.reduce(self.blocks(x), "b n d -> b d", "mean"))


class Tokens(nn.Module):
    """Tokens (B, 16, 12) in, through a function, to scores."""

    def __init__(self, function) -> None:
        super().__init__()
        self.embed, self.head, self.function = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 5), function

    def forward(self, image):
        x = self.function(einops.rearrange(self.embed(image), "b c h w -> b (h w) c"))
        return self.head(x.flatten(1)[:, :12])


def packed(x):
    together, shapes = einops.pack([x[:, :3], x[:, 3:]], "b * c")
    return einops.unpack(together, shapes, "b * c")[1]


SPELLINGS = {
    "einsum": lambda x: einops.einsum(x, x, "b n c, b m c -> b n m"),
    "pack": packed,
    "a list": lambda x: einops.rearrange([x, -x], "two b n c -> b (two n) c"),
    "parse_shape": lambda x: x * einops.parse_shape(x, "b n _")["n"],
    "repeat": lambda x: einops.repeat(x, "b n c -> b (n r) c", r=2),
    "a layer that reduces": layers.Reduce("b (n r) c -> b n c", "max", r=2),
    "groups of the batch": lambda x: einops.rearrange(
        einops.rearrange(x, "b (g n) c -> (b g) n c", g=2) * 2, "(b g) n c -> b (g n) c", g=2
    ),
}


def test_vit_pytorch_is_traced_with_all_roles() -> None:
    graph_module = traced(scrambled(ViT()), IMAGES)
    found = Counter(annotation_of(node).role for node in graph_module.graph.nodes)
    roles = (Role.QKV, Role.QK, Role.SOFTMAX, Role.AV, Role.PROJ, Role.FC1, Role.FC2)
    assert {role: found[role] for role in roles} == dict.fromkeys(roles, 2)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_function_of_einops_is_traced(name) -> None:
    trace(scrambled(Tokens(SPELLINGS[name])), IMAGES)


def test_einops_keeps_nothing_of_a_trace() -> None:
    graph_module = trace(scrambled(ViT()), IMAGES)
    head = weakref.ref(graph_module.get_submodule("head"))
    del graph_module
    gc.collect()
    assert head() is None
