"""torch's own attention modules, written out as linear, matmul, softmax, matmul while a model is traced.

`nn.MultiheadAttention` hides its projections in one function and computes, in inference, by one fused operation, which
no pass could quantize. Here it is, with heads h of E / H channels:

    q, k, v = query W_q^T + b_q, key W_k^T + b_k, value W_v^T + b_v       one linear where all three are the same tensor
    output  = concat_h(softmax(q_h k_h^T / sqrt(E / H) + mask) v_h) W_o^T + b_o

`nn.TransformerEncoder` and `nn.TransformerEncoderLayer` consist of it, of linear and LayerNorm, and are traced through:
they leave their fused path by themselves where they are given proxies. One thing differs between the two paths: with a
padding mask the fused one gives zeros for what is padded. Copies of a model take the path that computes it
(`plain_model`). Modules of a subclass with the forward of nn.MultiheadAttention, and calls of
`functional.multi_head_attention_forward`, are written out as well. Refused: bias_k, bias_v and add_zero_attn, which
append keys that come from no token, and keys that were projected elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn import functional

from fxquant.errors import TraceError
from fxquant.graph.capture.attention_forms import HIDDEN, attention_probabilities

TAKE_TENSORS = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Modules whose own code asks whether a mask is a tensor, and takes no proxy for one."""


@contextmanager
def written_out(root: nn.Module) -> Iterator[None]:
    """Within, every nn.MultiheadAttention of a model runs `_module_forward`, with the hooks it has."""
    found = [module for module in root.modules() if _has_torch_forward(module)]
    for module in found:
        module.forward = functools.partial(_module_forward, module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _has_torch_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.MultiheadAttention.forward and "forward" not in vars(module)


def _module_forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """`nn.MultiheadAttention.forward`; see there for the arguments."""
    _refuse(module.bias_k, module.bias_v, module.add_zero_attn)
    if not module.batch_first:
        query, key, value = _swapped(query, key, value)
    weights = (
        module.in_proj_weight
        if module._qkv_same_embed_dim
        else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    )
    mask = _merged_mask(attn_mask, key_padding_mask, module.num_heads, query.dtype)
    heads = _heads(query, key, value, weights, module.in_proj_bias, module.num_heads)
    mixed, probabilities = _attend(*heads, mask)
    output = module.out_proj(mixed)
    output = output if module.batch_first else output.transpose(0, 1)
    return output, _shown(probabilities, need_weights, average_attn_weights)


def multi_head_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """The function of torch written out; tokens come before images.

    Args: see `torch.nn.functional.multi_head_attention_forward`.

    Raises TraceError where probabilities are dropped at random, and for keys that come from no token.
    """
    _refuse(bias_k, bias_v, add_zero_attn)
    if training and dropout_p:
        raise TraceError(
            f"attention drops {dropout_p:.0%} of its probabilities at random: call multi_head_attention_forward with "
            f"training=self.training"
        )
    if static_k is not None or static_v is not None:
        raise TraceError("multi_head_attention_forward is given static_k or static_v: call it with key and value only")
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    query, key, value = _swapped(query, key, value)
    mask = _merged_mask(attn_mask, key_padding_mask, num_heads, query.dtype)
    mixed, probabilities = _attend(*_heads(query, key, value, weights, in_proj_bias, num_heads), mask)
    output = functional.linear(mixed, out_proj_weight, out_proj_bias).transpose(0, 1)
    return output, _shown(probabilities, need_weights, average_attn_weights)


def _refuse(bias_k: Any, bias_v: Any, add_zero_attn: bool) -> None:
    if bias_k is not None or bias_v is not None or add_zero_attn:
        option = "add_zero_attn" if add_zero_attn else "add_bias_kv"
        raise TraceError(
            f"nn.MultiheadAttention with {option}=True appends a key that comes from no token, which is not supported: "
            f"build it without, or write the attention out with nn.Linear and torch.matmul"
        )


def _swapped(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """(N, B, E) as (B, N, E); what was one tensor stays one."""
    swapped: dict[int, Any] = {}
    for tensor in (query, key, value):
        if id(tensor) not in swapped:
            swapped[id(tensor)] = tensor.transpose(0, 1)
    return swapped[id(query)], swapped[id(key)], swapped[id(value)]


def _heads(query: Any, key: Any, value: Any, weights: Any, bias: Any, num_heads: int) -> tuple[Any, Any, Any]:
    """q, k and v, (B, H, N, E / H) each.

    Args:
        query, key, value: (B, N, channels).
        weights: (3 E, E), or three of (E, channels).
        bias: (3 E,) or None.
        num_heads: H.
    """
    if len(query.shape) != 3:
        raise TraceError(
            f"nn.MultiheadAttention is given a query of {len(query.shape)} dimensions, and only images as a batch are "
            f"supported: give it (B, N, E)"
        )
    is_packed = not isinstance(weights, tuple)
    width = query.shape[2]
    size = width // num_heads
    if is_packed and query is key and key is value:
        images, tokens, _ = query.shape
        qkv = functional.linear(query, weights, bias).reshape(images, tokens, 3, num_heads, size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
    parts = [slice(i * width, (i + 1) * width) for i in range(3)]
    heads = []
    for i, (tensor, part) in enumerate(zip((query, key, value), parts, strict=True)):
        weight = weights[part] if is_packed else weights[i]
        projected = functional.linear(tensor, weight, None if bias is None else bias[part])
        heads.append(projected.reshape(tensor.shape[0], tensor.shape[1], num_heads, size).transpose(1, 2))
    return heads[0], heads[1], heads[2]


def _attend(q: Any, k: Any, v: Any, mask: Any) -> tuple[Any, Any]:
    """What the heads read, (B, L, E), and the probabilities (B, H, L, S)."""
    probabilities = attention_probabilities(q, k, mask)
    images, heads, tokens, size = q.shape
    return (probabilities @ v).transpose(1, 2).reshape(images, tokens, heads * size), probabilities


def _merged_mask(attn_mask: Any, key_padding_mask: Any, num_heads: int, dtype: Any) -> Any:
    """One mask that is added to the scores (B, H, L, S), or None.

    Args:
        attn_mask: (L, S) or (B H, L, S); boolean, True where nobody looks, or added to the scores.
        key_padding_mask: (B, S), likewise.
        num_heads: H.
        dtype: of the scores.
    """
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, dtype)
        mask = mask.unflatten(0, (-1, num_heads)) if len(mask.shape) == 3 else mask
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, dtype).unsqueeze(1).unsqueeze(1)
        mask = padding if mask is None else (mask + padding).clamp(min=HIDDEN)
    return mask


def _additive(mask: Any, dtype: Any) -> Any:
    """0 and a large negative number, which stays finite: torch's own masks have minus infinity there."""
    mask = mask.to(dtype) * HIDDEN if not mask.dtype.is_floating_point else mask
    return mask.clamp(min=HIDDEN)


def _shown(probabilities: Any, is_needed: bool, is_averaged: bool) -> Any:
    """The second result, which most callers do not look at; what nobody reads leaves the graph."""
    if not is_needed:
        return None
    return probabilities.mean(1) if is_averaged else probabilities
