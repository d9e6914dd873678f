"""Tiny Vision Transformers whose blocks, layers or weights are shared, or whose layers stand in lists."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS = 16, 2


def attend(qkv: nn.Module, proj: nn.Module, x: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    q, k, v = qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((q * (width // HEADS) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    return proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return attend(self.qkv, self.proj, x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """shared: what its two blocks have in common, one of SHARED."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.shared = shared
        self.patch, self.norm, self.head = nn.Conv2d(3, WIDTH, 8, 8), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        first, second = Block(), Block()
        if shared == "layers":
            second.attn.qkv, second.act = first.attn.qkv, first.act
            second.norm1 = second.norm2 = first.norm1
        if shared == "weights":
            second.fc1.weight, second.attn.qkv.weight = first.fc1.weight, first.attn.qkv.weight
        if shared == "lists":
            self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
            self.proj = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        else:
            self.blocks = nn.ModuleList([first, first if shared == "block" else second])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        if self.shared == "lists":
            for qkv, proj in zip(self.qkv, self.proj, strict=True):
                x = x + attend(qkv, proj, functional.layer_norm(x, (WIDTH,)))
            return self.head(self.norm(x)[:, 0])
        for block in self.blocks:
            x = block(x)
        if self.shared == "weights":
            first = self.blocks[0]
            x = x + functional.linear(functional.gelu(first.fc1(x)), first.fc1.weight.T)
            x = x + functional.linear(x, first.attn.proj.weight) * first.attn.proj.bias
        return self.head(self.norm(x)[:, 0])


SHARED = ("block", "layers", "weights", "lists")
