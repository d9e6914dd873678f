"""Modules of a lowered graph: bytes flow between them, integer kernels run inside them.

Each is made from the simulated module it replaces and computes the same: the same codes, the same integers, outputs
that differ by the rounding of float32 at most. Weights stay packed in memory, at the bits of the widest channel.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxquant.errors import BackendError
from fxquant.quantizers.row_log import RowLogQuantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.byte_table import ByteTable
from fxquant.runtime.native import library, operators
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedWeightModule

_OPERATORS = torch.ops.fxquant


@dataclass(frozen=True)
class Epilogue:
    """What a linear kernel does with its float result.

    Args:
        kind: `library.FLOAT`, `RESIDUAL` (adds a tensor), `CODES` (column range i of len(codes) equal ones: times
            factors[i], then codes[i]), `GELU_CODES` (codes[0] of GELU) or `TABLE_CODES` (what the table says).
        codes: what the result is written as: one code for each of as many equal ranges of columns.
        factors: what each of these ranges is multiplied with before.
        table: bytes of a function of the result, for TABLE_CODES.
    """

    kind: int = library.FLOAT
    codes: tuple[ByteCode, ...] = ()
    factors: tuple[float, ...] = ()
    table: ByteTable | None = None

    @property
    def gives_codes(self) -> bool:
        """Whether the result is bytes."""
        return self.kind in (library.CODES, library.GELU_CODES, library.TABLE_CODES)


class ToCodes(nn.Module):
    """Float to bytes."""

    spec: Tensor

    def __init__(self, code: ByteCode) -> None:
        super().__init__()
        self.code = code
        self.register_buffer("spec", operators.spec_tensor(code.quantizer_spec()))

    def forward(self, x: Tensor) -> Tensor:
        """float32 of any shape to uint8."""
        codes: Tensor = _OPERATORS.quantize(x, self.spec)
        return codes

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.code.bits}"


class RowLogToCodes(nn.Module):
    """Rows of a softmax to bytes, where the attention around it is not one kernel."""

    def __init__(self, code: ByteCode) -> None:
        super().__init__()
        self.code, self.quantizer = code, RowLogQuantizer(code.bits, code.scale)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., keys) to uint8."""
        return self.quantizer.quantize(x).to(torch.uint8)


class LayerNormToCodes(ToCodes):
    """Layer norm over the last dimension, then bytes."""

    def __init__(self, norm: nn.LayerNorm, code: ByteCode) -> None:
        super().__init__(code)
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., channels) to uint8."""
        codes: Tensor = _OPERATORS.layer_norm(x, self.spec, self.weight, self.bias, self.epsilon)
        return codes


class IntegerLinear(nn.Module):
    """A linear layer on bytes. `layout` is all it consists of: sizes, quantizers, packed weights, scales, bias.

    Args:
        source: the simulated layer, with its weight, bias and quantizers.
        code: how the input is bytes.
        epilogue: what becomes of the sums; None: they are returned as float32.
    """

    layout: Tensor

    def __init__(self, source: QuantizedWeightModule, code: ByteCode, epilogue: Epilogue | None = None) -> None:
        super().__init__()
        self.epilogue = epilogue or Epilogue()
        quantizer, codes = source.weight_quantizer, source.weight_codes
        if not isinstance(quantizer, UniformQuantizer) or quantizer.zero_point is not None or codes is None:
            raise BackendError("only weights of a symmetric uniform quantizer run as integers")
        self.out_features, self.in_features = codes.shape[0], codes[0].numel()
        self.register_buffer("layout", _packed(source, quantizer, codes, code, self.epilogue))

    def forward(self, codes: Tensor, residual: Tensor | None = None) -> Tensor:
        """uint8 (..., in) to float32 or uint8 (..., out). residual: float32 (..., out), where the epilogue adds one."""
        result: Tensor = _OPERATORS.linear(codes, self.layout, self.out_features, self.epilogue.gives_codes, residual)
        return result

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features} -> {self.out_features}"


def _packed(
    source: QuantizedWeightModule, quantizer: UniformQuantizer, codes: Tensor, code: ByteCode, epilogue: Epilogue
) -> Tensor:
    out_features, in_features = codes.shape[0], codes[0].numel()
    ranges = max(1, len(epilogue.codes))
    spec = library.LinearSpec(out_features, in_features, quantizer.widest_bits, epilogue.kind, ranges)
    spec.input, spec.steps = code.levels_spec(), 0 if epilogue.table is None else epilogue.table.steps
    for index, output in enumerate(epilogue.codes):
        spec.output[index] = output.quantizer_spec()
        spec.factor[index] = epilogue.factors[index] if epilogue.factors else 1.0
    layout = torch.empty(library.library().fxq_linear_bytes(ctypes.byref(spec)), dtype=torch.uint8)
    flat = codes.detach().flatten(1).contiguous()
    scale = quantizer.scale.reshape(-1).expand(out_features).contiguous()
    bias = (
        torch.zeros(out_features, dtype=torch.float32)
        if source.bias is None
        else source.bias.detach().float().contiguous()
    )
    entries = torch.empty(0, dtype=torch.uint8)
    if epilogue.table is not None:
        entries = epilogue.table.entries
        scale, bias = scale / epilogue.table.scale, bias / epilogue.table.scale + epilogue.table.zero
    library.call(
        "linear_pack", ctypes.byref(spec), flat.data_ptr(), flat.numel(), scale.data_ptr(), bias.data_ptr(),
        bias.nbytes, entries.data_ptr() or None, entries.numel(), layout.data_ptr(), layout.numel(),
    )  # fmt: skip
    return layout


class IntegerConv2d(IntegerLinear):
    """A convolution on bytes, as a linear layer over patches. Groups and dilation are not for it."""

    def __init__(self, source: QuantizedConv2d, code: ByteCode) -> None:
        super().__init__(source, code)
        assert source.weight_codes is not None  # the constructor above refuses it
        self.kernel: tuple[int, int] = tuple(source.weight_codes.shape[2:])  # type: ignore[assignment]
        self.stride, padding = _pair(source.geometry["stride"]), _pair(source.geometry["padding"])
        self.padding, self.zero = (padding[1], padding[1], padding[0], padding[0]), code.zero

    def forward(self, codes: Tensor, residual: Tensor | None = None) -> Tensor:
        """uint8 (B, in, H, W) to float32 (B, out, H', W')."""
        if any(self.padding):
            codes = functional.pad(codes, self.padding, value=self.zero)
        return super().forward(_OPERATORS.patches(codes, self.kernel, self.stride)).permute(0, 3, 1, 2)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class AssembleTokens(nn.Module):
    """Tokens of patches with their positions, behind those that every image has."""

    positions: Tensor
    first: Tensor

    def __init__(self, positions: Tensor, first: Tensor) -> None:
        """positions: float32 (N, C), added. first: float32 (n, C), class tokens with theirs; n may be 0."""
        super().__init__()
        self.register_buffer("positions", positions.detach())
        self.register_buffer("first", first.detach())

    def forward(self, x: Tensor) -> Tensor:
        """float32 (B, N, C) to float32 (B, n + N, C)."""
        tokens: Tensor = _OPERATORS.tokens(x, self.positions, self.first)
        return tokens


class IntegerMatmul(nn.Module):
    """Product of two activations, both bytes; the right one has a uniform quantizer."""

    levels: Tensor
    row_levels: Tensor | None

    def __init__(self, left: ByteCode, right: ByteCode) -> None:
        super().__init__()
        numbers = torch.from_numpy(left.levels).float() if left.of_rows else None
        self.register_buffer("row_levels", numbers)
        self.register_buffer("levels", operators.spec_tensor(left.levels_spec()))
        self.right_zero, self.scale = right.zero, left.unit * right.unit

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """uint8 (..., n, k) times uint8 (..., k, m) to float32 (..., n, m)."""
        transposed = right.mT.is_contiguous()
        result: Tensor = _OPERATORS.matmul(
            left, right.mT if transposed else right, self.levels, self.right_zero, self.scale, transposed
        )
        if self.row_levels is None:
            return result
        return result / self.row_levels[left.int()].sum(-1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class AttentionCodes:
    """The quantizers of one attention: of q, k and v, of the softmax, of the result.

    Args:
        qkv: how q, k and v are bytes.
        softmax: how the attention probabilities are bytes.
        output: how the result is bytes.
    """

    qkv: tuple[ByteCode, ByteCode, ByteCode]
    softmax: ByteCode
    output: ByteCode


class IntegerAttention(nn.Module):
    """softmax(q k^T + bias) v on bytes, to bytes, one image and head at a time.

    Args:
        heads: how many heads there are.
        head_size: channels of one head.
        codes: the quantizers.
        bias_ghnn: float32 (groups, heads, N, N), added to the scores of image i from group i mod groups; None: nothing
            is added.
    """

    spec: Tensor
    bias: Tensor | None

    def __init__(self, heads: int, head_size: int, codes: AttentionCodes, bias_ghnn: Tensor | None = None) -> None:
        """bias_ghnn: float32 (groups, heads, N, N), added to the scores of image i from group i mod groups."""
        super().__init__()
        query, key, value = codes.qkv
        spec = library.AttentionSpec(heads, head_size, (ctypes.c_int32 * 3)(query.zero, key.zero, value.zero))
        spec.score_scale, spec.value_scale = query.unit * key.unit, codes.softmax.unit * value.unit
        spec.softmax, spec.softmax_levels = codes.softmax.quantizer_spec(), codes.softmax.levels_spec()
        spec.output = codes.output.quantizer_spec()
        self.register_buffer("spec", operators.spec_tensor(spec))
        self.register_buffer("bias", bias_ghnn)

    def forward(self, qkv: Tensor) -> Tensor:
        """uint8 (B, N, 3 C) to uint8 (B, N, C)."""
        codes: Tensor = _OPERATORS.attention(qkv, self.spec, self.bias)
        return codes


class SeparateAttention(nn.Module):
    """The same on q, k and v that do not lie side by side: their bytes are put together first, a head at a time.

    Args:
        heads: 1 where there is no dimension of heads.
        head_size: channels of one head.
        codes: of everything.
        bias_ghnn: float32 (groups, heads, N, N), added to the scores of image i from group i mod groups; None: nothing
            is added.
    """

    def __init__(self, heads: int, head_size: int, codes: AttentionCodes, bias_ghnn: Tensor | None = None) -> None:
        """bias_ghnn: float32 (groups, heads, N, N), added to the scores of image i from group i mod groups."""
        super().__init__()
        self.heads, self.head_size, self.codes = heads, head_size, codes
        bias = None if bias_ghnn is None else bias_ghnn.flatten(0, 1).unsqueeze(1).contiguous()
        self.kernel = IntegerAttention(1, head_size, codes, bias)
        self.groups = 0 if bias_ghnn is None else len(bias_ghnn)

    @property
    def bias_ghnn(self) -> Tensor | None:
        """What is added to the scores, float32 (groups, heads, N, N)."""
        bias = self.kernel.bias
        return None if bias is None else bias.reshape(self.groups, self.heads, *bias.shape[2:])

    def forward(self, query: Tensor, transposed_key: Tensor, value: Tensor) -> Tensor:
        """uint8 (..., N, D), (..., D, N) and (..., N, D) to uint8 (..., N, D).

        Args:
            query: uint8 (..., N, D).
            transposed_key: uint8 (..., D, N).
            value: uint8 (..., N, D).
        """
        packed = torch.stack([query, transposed_key.mT, value], -2).flatten(-2)
        result: Tensor = self.kernel(packed.reshape(-1, *packed.shape[-2:]))
        return result.reshape(value.shape)
