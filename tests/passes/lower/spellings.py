"""Vision Transformers whose authors spell attention each in their own way."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH, HEADS, SIZE, TOKENS = 24, 3, 8, 4
Attend = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """One pre-norm block. attend: tokens (B, N, C) to heads side by side (B, N, C)."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm1, self.norm2, self.inner = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2, self.gelu = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH), nn.GELU()
        self.register_buffer("bias", torch.randn(HEADS, TOKENS, TOKENS))
        self.register_buffer("scale", torch.tensor(0.3))
        self.register_buffer("hidden", torch.ones(TOKENS, TOKENS).triu(2).bool())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self, self.norm1(x)))
        result: Tensor = x + self.fc2(self.gelu(self.fc1(self.norm2(x))))
        return result


class Model(nn.Module):
    """Two blocks between an embedding of 16 x 16 patches and a head."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, WIDTH, 16, 16), nn.Linear(WIDTH, 7)
        self.blocks, self.norm = nn.Sequential(Block(attend), Block(attend)), nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.embed(image).flatten(2).transpose(1, 2)
        scores: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return scores


def _heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], HEADS, SIZE).permute(0, 2, 1, 3)


def _merged(x: Tensor) -> Tensor:
    x = x.permute(0, 2, 1, 3).contiguous()
    return x.view(*x.shape[:-2], WIDTH)


def hugging_face(m: Block, x: Tensor) -> Tensor:
    """As the ViT of transformers has it: three layers, scores divided by the root of the size."""
    key, value, query = _heads(m.key(x)), _heads(m.value(x)), _heads(m.query(x))
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(SIZE)
    return _merged(torch.matmul(nn.functional.softmax(scores, dim=-1), value))


def scaled_before_heads(m: Block, x: Tensor) -> Tensor:
    """As transformers' CLIP: queries are scaled as the layer gives them, and heads are images of a batch."""
    b = x.shape[0]
    query, key, value = (
        t.view(b, TOKENS, HEADS, SIZE).transpose(1, 2) for t in (m.query(x) * SIZE**-0.5, m.key(x), m.value(x))
    )
    return ((query @ key.mT).softmax(-1) @ value).transpose(1, 2).reshape(b, TOKENS, WIDTH)


def root_on_both(m: Block, x: Tensor) -> Tensor:
    """One layer whose result is cut by chunk, and the root of the scale on queries and keys."""
    query, key, value = (_heads(t) for t in m.qkv(x).chunk(3, -1))
    weights = ((query * SIZE**-0.25) @ (key * SIZE**-0.25).transpose(3, 2)).softmax(-1)
    return _merged(weights @ value)


def heads_outside(m: Block, x: Tensor) -> Tensor:
    """One layer whose columns are heads of q, k and v each; scores times a constant, a bias first in the sum."""
    b, n, _ = x.shape
    query, key, value = m.qkv(x).reshape(b, n, HEADS, 3, SIZE).permute(3, 0, 2, 1, 4)
    scores = m.bias + m.scale * torch.matmul(query, key.permute(0, 1, 3, 2))
    return torch.matmul(scores.softmax(3), value).transpose(1, 2).flatten(2)


def by_einsum(m: Block, x: Tensor) -> Tensor:
    """Einsum from (B, N, H, D)."""
    query, key, value = (t.unflatten(-1, (HEADS, SIZE)) for t in (m.query(x), m.key(x), m.value(x)))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * SIZE**-0.5
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value).flatten(2)


def masked(m: Block, x: Tensor) -> Tensor:
    """Scores that a constant mask fills."""
    query, key, value = _heads(m.query(x)), _heads(m.key(x)), _heads(m.value(x))
    scores = (0.3 * query) @ key.transpose(-2, -1)
    return _merged(scores.masked_fill(m.hidden, float("-inf")).softmax(-1) @ value)


def rotated(m: Block, x: Tensor) -> Tensor:
    """Something between the layers of queries and keys and the product, as rotary embeddings are."""
    query, key, value = _heads(m.query(x)), _heads(m.key(x)), _heads(m.value(x))
    query, key = (torch.cat([-t[..., SIZE // 2 :], t[..., : SIZE // 2]], -1) * 0.5 + t for t in (query, key))
    return _merged((query * 0.3 @ key.transpose(-2, -1)).softmax(-1) @ value)


def scaled_scores(m: Block, x: Tensor) -> Tensor:
    """Scores times a number for each head, which no kernel does."""
    query, key, value = _heads(m.query(x)), _heads(m.key(x)), _heads(m.value(x))
    scores = query @ key.transpose(-2, -1) * m.bias[:, :1, :1]
    return _merged(scores.softmax(-1) @ value)


def normed_result(m: Block, x: Tensor) -> Tensor:
    """A layer norm behind the attention, EVA-02's sub-LN."""
    result: Tensor = m.inner(hugging_face(m, x))
    return result


def pooled_keys(m: Block, x: Tensor) -> Tensor:
    """Fewer keys than queries."""
    query, key, value = _heads(m.query(x)), _heads(m.key(x[:, :2])), _heads(m.value(x[:, :2]))
    return _merged((query * 0.3 @ key.transpose(-2, -1)).softmax(-1) @ value)


DIRECT: dict[str, Attend] = {
    "Hugging Face": hugging_face,
    "scaled before heads": scaled_before_heads,
    "root on both": root_on_both,
    "heads outside": heads_outside,
    "einsum": by_einsum,
    "masked": masked,
}
"""Attention that reads the bytes of linear layers."""

REFUSED: dict[str, tuple[Attend, str]] = {
    "scaled scores": (scaled_scores, "scores go through 'mul'"),
    "sub-LN": (normed_result, "read in float, by 'LayerNorm'"),
    "pooled keys": (pooled_keys, "4 queries and 2 keys"),
}
"""Attention that no kernel computes, and what is said of it."""
