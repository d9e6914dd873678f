"""Attention in one form, softmax(q k^T * scale + mask) v, written as torch code that the tracer records.

The mask is additive: a boolean or causal one becomes a tensor of 0 and a large negative number, a constant where it
does not depend on the image. That number stays finite, so that nothing downstream meets infinity; its exponential is 0.
A row that is masked everywhere has no meaning here, and is found when the graph is compared with the model.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fxquant.errors import TraceError

HIDDEN = torch.finfo(torch.float32).min / 4
"""What hides a key when it is added to a score; it stays finite when it is scaled by log2(e), as kernels do."""


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`, written out; raises TraceError where it draws at random.

    Args:
        query: (..., L, E).
        key: (..., S, E).
        value: (..., S, V).
        attn_mask: broadcastable to (..., L, S); boolean, True where a key takes part, or added to the scores.
        dropout_p: share of probabilities that are dropped; must be 0.
        is_causal: whether query i sees keys 0 to i only.
        scale: of the scores, 1 / sqrt(E) if not given.
        enable_gqa: whether key and value have fewer heads, each for several heads of the query.
    """
    if dropout_p:
        raise TraceError(
            f"attention drops {dropout_p:.0%} of its probabilities at random: set dropout_p=0 in inference"
        )
    if enable_gqa:
        key, value = _repeated(key, query), _repeated(value, query)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return attention_probabilities(query, key, attn_mask, scale) @ value


def attention_probabilities(query: Any, key: Any, attn_mask: Any = None, scale: float | None = None) -> Any:
    """softmax(q k^T * scale + mask), (..., L, S).

    Args: see `torch.nn.functional.scaled_dot_product_attention`.
    """
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + _additive(attn_mask, query.dtype)
    return torch.softmax(scores, -1)


def _additive(mask: Any, dtype: torch.dtype) -> Any:
    return torch.where(mask, 0.0, HIDDEN).to(dtype) if mask.dtype == torch.bool else mask


def _repeated(x: Any, query: Any) -> Any:
    """Every head of (B, H, S, E) as often in a row as the query has heads for it."""
    times = query.shape[-3] // x.shape[-3]
    if times == 1:
        return x
    before = len(x.shape) - 3
    return x.unsqueeze(-3).expand(*[-1] * (before + 1), times, -1, -1).flatten(before, before + 1)
