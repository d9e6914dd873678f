"""The kernels as torch operators `fxquant::*`, with shapes for fake tensors: fx, compile and export see through them.

Specs and layouts are uint8 tensors (the bytes of the structures in `library.py`), so that they are buffers of modules:
copied, saved and exported like any other. Everything runs on the CPU, on `torch.get_num_threads()` threads, and gives
the same result for any number of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import BackendError
from fxquant.runtime.native.given_tensors import filled, pointer, readable, spec_pointer, vector
from fxquant.runtime.native.library import AttentionSpec, LevelsSpec, QuantizerSpec

_LIBRARY: Any = torch.library.Library("fxquant", "DEF")  # type: ignore[no-untyped-call]
_SCHEMAS = (
    "quantize(Tensor x, Tensor quantizer) -> Tensor",
    "layer_norm(Tensor x, Tensor quantizer, Tensor? weight, Tensor? bias, float epsilon) -> Tensor",
    "norm(Tensor x, Tensor? weight, Tensor? bias, float epsilon) -> Tensor",
    "mean(Tensor x) -> Tensor",
    "linear(Tensor codes, Tensor layout, int out_features, bool gives_codes, Tensor? residual=None) -> Tensor",
    "matmul(Tensor left, Tensor right, Tensor levels, int right_zero, float scale, bool transposed) -> Tensor",
    "attention(Tensor qkv, Tensor spec, Tensor? bias=None) -> Tensor",
    "patches(Tensor codes, int[2] kernel, int[2] stride) -> Tensor",
    "tokens(Tensor x, Tensor positions, Tensor first) -> Tensor",
    "chain(Tensor x, Tensor layout, int width, bool gives_codes, int tokens=0, int parts=1) -> Tensor",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)


def spec_tensor(spec: ctypes.Structure) -> Tensor:
    """The bytes of a structure: uint8 (sizeof,)."""
    return torch.frombuffer(bytearray(bytes(spec)), dtype=torch.uint8)


def quantize(x: Tensor, quantizer: Tensor) -> Tensor:
    """Bytes (uint8) of float32 x, same shape. quantizer: the bytes of a `QuantizerSpec`."""
    x = readable(x, torch.float32, "x")
    out = torch.empty_like(x, dtype=torch.uint8)
    spec_at = spec_pointer(quantizer, QuantizerSpec, "the quantizer")
    threads = torch.get_num_threads()
    return filled(out, "quantize", spec_at, x.data_ptr(), x.numel(), out.data_ptr(), out.numel(), threads)


def layer_norm(x: Tensor, quantizer: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Bytes (uint8) of the layer norm of float32 x (..., channels) over its last dimension.

    Args:
        x: float32 (..., channels).
        quantizer: the output's `QuantizerSpec` as bytes, uint8 (n,).
        weight: float32 (channels,), or None.
        bias: float32 (channels,), or None.
        epsilon: what is added to the variance.
    """
    x = readable(x, torch.float32, "x")
    channels = x.shape[-1]
    weight, bias = vector(weight, channels, "weight"), vector(bias, channels, "bias")
    out = torch.empty_like(x, dtype=torch.uint8)
    spec_at = spec_pointer(quantizer, QuantizerSpec, "the quantizer")
    return filled(
        out, "layer_norm", spec_at, x.data_ptr(), x.numel() // max(channels, 1), channels, pointer(weight),
        pointer(bias), epsilon, out.data_ptr(), out.numel(), torch.get_num_threads(),
    )  # fmt: skip


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """The layer norm of float32 x (..., channels) over its last dimension, in float32.

    Args:
        x: float32 (..., channels).
        weight: float32 (channels,), or None.
        bias: float32 (channels,), or None.
        epsilon: what is added to the variance.
    """
    x, channels = readable(x, torch.float32, "x"), x.shape[-1]
    weight, bias = vector(weight, channels, "weight"), vector(bias, channels, "bias")
    out = torch.empty_like(x)
    return filled(
        out, "norm", x.data_ptr(), x.numel() // max(channels, 1), channels, pointer(weight), pointer(bias), epsilon,
        out.data_ptr(), out.nbytes, torch.get_num_threads(),
    )  # fmt: skip


def mean(x: Tensor) -> Tensor:
    """Means over rows, float32 (B, C) of x (B, N, C)."""
    x = readable(x, torch.float32, "x")
    out = torch.empty((x.shape[0], x.shape[2]), dtype=torch.float32)
    return filled(out, "mean", x.data_ptr(), *x.shape, out.data_ptr(), out.nbytes, torch.get_num_threads())


def linear(
    codes: Tensor, layout: Tensor, out_features: int, gives_codes: bool, residual: Tensor | None = None
) -> Tensor:
    """A linear layer on bytes (..., in): float32 (..., out), residual added; or bytes, as the layout says.

    Args:
        codes: bytes of the input, uint8 (..., in).
        layout: uint8 (n,), all that the kernel knows of the layer.
        out_features: channels of the result.
        gives_codes: whether the layout says that the result is bytes.
        residual: float32 (..., out), added to the result; None: nothing is added.
    """
    codes, layout = readable(codes, torch.uint8, "codes"), readable(layout, torch.uint8, "the layout")
    rows = codes.numel() // max(codes.shape[-1], 1)
    out = torch.empty((*codes.shape[:-1], out_features), dtype=torch.uint8 if gives_codes else torch.float32)
    if residual is not None:
        residual = vector(residual, out.numel(), "residual")
    return filled(
        out, "linear", layout.data_ptr(), layout.numel(), codes.data_ptr(), codes.numel(), rows, pointer(residual),
        0 if residual is None else residual.numel() * 4, out.data_ptr(), out.nbytes, torch.get_num_threads(),
    )  # fmt: skip


def matmul(left: Tensor, right: Tensor, levels: Tensor, right_zero: int, scale: float, transposed: bool) -> Tensor:
    """float32 (..., n, m) of bytes left (..., n, k) and right (..., k, m), or (..., m, k) where `transposed`.

    Args:
        left: uint8 (..., n, k).
        right: uint8 (..., k, m), or (..., m, k) where `transposed`.
        levels: the integers that the bytes of the left operand stand for.
        right_zero: the byte that stands for 0 in the right operand.
        scale: what one unit of the sums is worth.
        transposed: whether the right operand lies with its summed axis last.
    """
    left, right = readable(left, torch.uint8, "left"), readable(right, torch.uint8, "right")
    columns = right.shape[-2 if transposed else -1]
    if left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-1 if transposed else -2]:
        raise BackendError(f"codes {tuple(left.shape)} and {tuple(right.shape)} cannot be multiplied")
    out = torch.empty((*left.shape[:-1], columns), dtype=torch.float32)
    return filled(
        out, "matmul", spec_pointer(levels, LevelsSpec, "levels"), right_zero, scale, left.data_ptr(), left.numel(),
        right.data_ptr(), right.numel(), int(transposed), left.shape[:-2].numel(), left.shape[-2], left.shape[-1],
        columns, out.data_ptr(), out.nbytes, torch.get_num_threads(),
    )  # fmt: skip


def attention(qkv: Tensor, spec: Tensor, bias: Tensor | None = None) -> Tensor:
    """Bytes (B, N, C) of softmax(q k^T + bias) v from bytes qkv (B, N, 3 C), laid out (3, heads, head size).

    Args:
        qkv: uint8 (B, N, 3 C), laid out (3, heads, head size).
        spec: uint8 (n,), all that the kernel knows of the attention.
        bias: float32 (groups, heads, N, N), image i takes group i mod groups.
    """
    qkv = readable(qkv, torch.uint8, "qkv")
    batch, tokens, channels = qkv.shape
    out = torch.empty((batch, tokens, channels // 3), dtype=torch.uint8)
    spec_at = spec_pointer(spec, AttentionSpec, "the spec")
    size = 0
    if bias is not None:
        bias, groups = readable(bias, torch.float32, "bias"), bias.shape[0]
        size = bias.nbytes
        heads = AttentionSpec.from_address(spec_at).heads
        if tuple(bias.shape) != (groups, heads, tokens, tokens) or groups == 0 or batch % groups:
            raise BackendError(
                f"bias {tuple(bias.shape)} does not fit {batch} images of {heads} heads, {tokens} tokens"
            )
    return filled(
        out, "attention", spec_at, qkv.data_ptr(), qkv.numel(), batch, tokens, pointer(bias), size, out.data_ptr(),
        out.numel(), torch.get_num_threads(),
    )  # fmt: skip


def patches(codes: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Bytes (B, rows, columns, C kernel size): what a kernel sees of uint8 codes (B, C, H, W).

    Args:
        codes: uint8 (B, C, H, W).
        kernel: height and width of the kernel.
        stride: steps of the kernel down and to the right.
    """
    codes = readable(codes, torch.uint8, "codes")
    out = torch.empty(_patch_sizes(codes, kernel, stride), dtype=torch.uint8)
    return filled(
        out, "patches", codes.data_ptr(), codes.numel(), *codes.shape, *kernel, *stride, out.data_ptr(), out.numel(),
        torch.get_num_threads(),
    )  # fmt: skip


def _patch_sizes(codes: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> tuple[Any, ...]:
    if len(codes.shape) != 4 or min(*kernel, *stride) < 1 or codes.shape[2] < kernel[0] or codes.shape[3] < kernel[1]:
        raise BackendError(f"images {tuple(codes.shape)} have no patches of {tuple(kernel)}, {tuple(stride)} apart")
    places = [(codes.shape[i + 2] - kernel[i]) // stride[i] + 1 for i in range(2)]
    return (codes.shape[0], *places, codes.shape[1] * kernel[0] * kernel[1])


def tokens(x: Tensor, positions: Tensor, first: Tensor) -> Tensor:
    """float32 (B, n + N, C): first (n, C), then x (B, N, C) plus positions (N, C).

    Args:
        x: float32 (B, N, C).
        positions: float32 (N, C), added to x.
        first: float32 (n, C), put before the tokens of every image.
    """
    x, positions, first = (readable(each, torch.float32, "x") for each in (x, positions, first))
    if positions.shape != x.shape[1:] or first.ndim != 2 or first.shape[1:] != x.shape[2:]:
        raise BackendError(f"{tuple(first.shape)} and {tuple(positions.shape)} do not fit tokens {tuple(x.shape)}")
    out = torch.empty(_token_sizes(x, first), dtype=torch.float32)
    return filled(
        out, "tokens", x.data_ptr(), x.nbytes, *x.shape, positions.data_ptr(), positions.nbytes, first.data_ptr(),
        first.nbytes, out.data_ptr(), out.nbytes, torch.get_num_threads(),
    )  # fmt: skip


def _token_sizes(x: Tensor, first: Tensor) -> tuple[Any, ...]:
    return (x.shape[0], first.shape[0] + x.shape[1], x.shape[2])


def chain(x: Tensor, layout: Tensor, width: int, gives_codes: bool, tokens: int = 0, parts: int = 1) -> Tensor:
    """A chain of layers on float32 x (B, N, C): float32 or bytes (B, N / parts, width), as the layout says.

    Args:
        x: float32 (B, N, C).
        layout: uint8 (n,), all that the kernels know of the chain.
        width: channels of the result.
        gives_codes: whether the layout says that the result is bytes.
        tokens: rows that attention takes together, 0 for all of an image.
        parts: rows of x in one of the chain's.
    """
    x, layout = readable(x, torch.float32, "x"), readable(layout, torch.uint8, "the layout")
    out = torch.empty(_chain_sizes(x, width, parts), dtype=torch.uint8 if gives_codes else torch.float32)
    rows = out.shape[0] * out.shape[1]
    tokens = tokens or out.shape[1]
    if rows % max(tokens, 1) or parts < 1:
        raise BackendError(f"{rows} rows are no groups of {tokens}")
    return filled(
        out, "chain", layout.data_ptr(), layout.numel(), rows // max(tokens, 1), tokens, x.data_ptr(), x.nbytes,
        out.data_ptr(), out.nbytes, torch.get_num_threads(),
    )  # fmt: skip


def _chain_sizes(x: Tensor, width: int, parts: int) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1] // max(parts, 1), width


def _quantize_shape(x: Tensor, quantizer: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)


def _layer_norm_shape(x: Tensor, quantizer: Tensor, weight: object, bias: object, epsilon: float) -> Tensor:
    return _quantize_shape(x, quantizer)


def _norm_shape(x: Tensor, weight: object, bias: object, epsilon: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _mean_shape(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]))


def _linear_shape(
    codes: Tensor, layout: Tensor, out_features: int, gives_codes: bool, residual: Tensor | None = None
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=torch.uint8 if gives_codes else torch.float32)


def _matmul_shape(
    left: Tensor, right: Tensor, levels: Tensor, right_zero: int, scale: float, transposed: bool
) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-2 if transposed else -1]), dtype=torch.float32)


def _attention_shape(qkv: Tensor, spec: Tensor, bias: Tensor | None = None) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))


def _chain_shape(x: Tensor, layout: Tensor, width: int, gives_codes: bool, tokens: int = 0, parts: int = 1) -> Tensor:
    return x.new_empty(_chain_sizes(x, width, parts), dtype=torch.uint8 if gives_codes else torch.float32)


def _patches_shape(codes: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    return codes.new_empty(_patch_sizes(codes, kernel, stride))


def _tokens_shape(x: Tensor, positions: Tensor, first: Tensor) -> Tensor:
    return x.new_empty(_token_sizes(x, first))


for _name, _kernel, _shape in (
    ("quantize", quantize, _quantize_shape),
    ("layer_norm", layer_norm, _layer_norm_shape),
    ("norm", norm, _norm_shape),
    ("mean", mean, _mean_shape),
    ("linear", linear, _linear_shape),
    ("matmul", matmul, _matmul_shape),
    ("attention", attention, _attention_shape),
    ("patches", patches, _patches_shape),
    ("tokens", tokens, _tokens_shape),
    ("chain", chain, _chain_shape),
):
    _LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"fxquant::{_name}", _shape, lib=_LIBRARY)
