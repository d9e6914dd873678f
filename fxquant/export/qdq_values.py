"""What a quantizer and a quantized weight become in ONNX: see `fxquant.export.qdq`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fxquant.quantizers.codebook import CodebookQuantizer
from fxquant.quantizers.level_table import LevelTableQuantizer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.row_log import LARGEST, RowLogQuantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.quantizers.uniform_channels import UniformChannelsQuantizer
from fxquant.runtime.integer.byte_codes import byte_code
from fxquant.runtime.simulated import QuantizedWeightModule

OPSET = 21
_WIDEST = 8


@dataclass(frozen=True)
class Form:
    """Which of several equal ways to write a thing a runtime is given: the one that it runs fastest.

    Args:
        unsigned: codes of symmetric quantizers are uint8 around 128 instead of int8. The products of ONNX Runtime take
            uint8; it converts int8 by itself, but not behind every operation.
        patch_products: a convolution whose windows stand side by side, as those of patches do, is written as a product.
            ONNX Runtime runs a convolution as integers only if what comes out is quantized too, a product always.
        leading_axis: a product of two matrices gets an axis in front. ONNX Runtime would make one with a bias Gemm,
            which runs in float for the same reason.
    """

    unsigned: bool = False
    patch_products: bool = False
    leading_axis: bool = False


FORMS = {"any": Form(), "onnxruntime": Form(unsigned=True, patch_products=True, leading_axis=True)}
"""By runtime. "any" is what OpenVINO is best given, and what every runtime takes."""


def _onnx(
    operator: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, axis: int | None, shape: torch.Size | None = None
) -> Tensor:
    """shape: of the result, None for that of the first input."""
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    return torch.onnx.ops.symbolic(
        f"::{operator}",
        inputs,
        attributes,
        dtype=dtype,
        shape=inputs[0].shape if shape is None else shape,
        version=OPSET,
    )


class Codes(nn.Module):
    """Float to codes and back to float.

    Args:
        scale: what one step of the codes is worth, float32 ().
        zero: int8 or uint8 (), which is the dtype of the codes.
        bounds: lowest and highest float; None where the dtype bounds the codes by itself.
        nearest: a quantizer or module that gives the nearest level first, where levels are not all the multiples of
            scale.
        book: uint8 (256,), the code that takes the place of each; None where all stay.
    """

    scale: Tensor
    zero: Tensor
    book: Tensor | None

    def __init__(
        self,
        scale: Tensor,
        zero: Tensor,
        bounds: tuple[float, float] | None = None,
        nearest: nn.Module | None = None,
        book: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("book", book)
        self.nearest, self.bounds = nearest, bounds

    def forward(self, x: Tensor) -> Tensor:
        """float32 of any shape to the same."""
        x = x if self.nearest is None else self.nearest(x)
        x = x if self.bounds is None else x.clamp(*self.bounds)
        codes = _onnx("QuantizeLinear", (x, self.scale, self.zero), self.zero.dtype, None)
        if self.book is not None:
            codes = _onnx("Gather", (self.book, codes.int()), self.zero.dtype, 0, codes.shape)
        return _onnx("DequantizeLinear", (codes, self.scale, self.zero), torch.float32, None)


class RowLevels(nn.Module):
    """Levels of a row-log quantizer, relative to the largest of their row."""

    levels: Tensor

    def __init__(self, quantizer: RowLogQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.register_buffer("levels", quantizer.levels() / LARGEST)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., keys) to the same."""
        return self.levels[self.quantizer.quantize(x).long()]


class NearestLevel(nn.Module):
    """A level table by bisection: `bits` comparisons, each with a threshold gathered from the table."""

    levels: Tensor
    thresholds: Tensor

    def __init__(self, quantizer: LevelTableQuantizer) -> None:
        super().__init__()
        levels = quantizer.levels()
        self.bits = max(1, (len(levels) - 1).bit_length())
        middles = (levels[1:] + levels[:-1]) / 2
        self.register_buffer("levels", levels)
        self.register_buffer("thresholds", functional.pad(middles, (0, 2**self.bits - len(levels)), value=torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        """float32 of any shape to the nearest levels."""
        codes = torch.zeros_like(x, dtype=torch.int64)
        for bit in reversed(range(self.bits)):
            codes = codes + (x > self.thresholds[codes + (2**bit - 1)]) * 2**bit
        return self.levels[codes]


class Weight(nn.Module):
    """A weight as codes and a scale per output channel, dequantized; float where it has no uniform quantizer.

    bits: of the codes, of the widest where channels have widths of their own; None for a float weight. widths: these,
    int8 (out,), else None.

    Args:
        source: the simulated layer whose weight it is.
        transposed: a matrix (in, out), as a product wants it, also where it is a convolution's.
        is_int8: whether the other side of the product has codes too; where it has none, the weight is multiplied out by
            plain operators, since runtimes take DequantizeLinear there as a permission to quantize the other side as
            they like.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, source: QuantizedWeightModule, transposed: bool, is_int8: bool) -> None:
        super().__init__()
        self.is_int8 = is_int8
        quantizer, codes = source.weight_quantizer, source.weight_codes
        values = source.weight if codes is None else codes
        self.bits: int | None = None
        self.widths: NDArray[np.int8] | None = None
        if isinstance(quantizer, UniformQuantizer) and codes is not None:
            self.bits, zero = quantizer.widest_bits, quantizer.zero_point
            values = codes if zero is None else codes.to(torch.uint8)
            if isinstance(quantizer, UniformChannelsQuantizer):
                self.widths = quantizer.widths[:, 0].cpu().numpy()
            self.register_buffer("scale", _per_channel(quantizer.scale, len(codes)))
            self.register_buffer("zero", None if zero is None else _per_channel(zero, len(codes)).to(torch.uint8))
        self.axis = 1 if transposed else 0
        self.register_buffer("values", (values.flatten(1).mT if transposed else values).detach().contiguous())

    def forward(self) -> Tensor:
        """The float32 weight."""
        if self.bits is None:
            return self.values
        if not self.is_int8:
            # The clamp changes nothing. It hides a pattern that OpenVINO takes for DequantizeLinear.
            codes = self.values.float().clamp(-128, 255)
            codes = codes if self.zero is None else codes - self._along(self.zero.float())
            return codes * self._along(self.scale)
        inputs = (self.values, self.scale) if self.zero is None else (self.values, self.scale, self.zero)
        return _onnx("DequantizeLinear", inputs, torch.float32, self.axis)

    def _along(self, numbers: Tensor) -> Tensor:
        """One number per output channel, in the shape that multiplies the weight."""
        return numbers if self.axis == 1 else numbers.reshape(-1, *[1] * (self.values.ndim - 1))


def _per_channel(numbers: Tensor, channels: int) -> Tensor:
    return numbers.detach().reshape(-1).expand(channels).contiguous()


def quantized(quantizer: Quantizer | None, form: Form = FORMS["any"]) -> nn.Module:
    """A module that gives the quantizer's values, through codes where a byte holds them."""
    if quantizer is None:
        return nn.Identity()
    if isinstance(quantizer, UniformQuantizer):
        return _uniform(quantizer, form) or quantizer
    if isinstance(quantizer, CodebookQuantizer):
        zero, book = (torch.tensor(number, dtype=torch.uint8) for number in (quantizer.zero, quantizer.codes))
        return Codes(quantizer.scale.detach(), zero, book=book[quantizer.index.long()])
    code = byte_code(quantizer)
    if code is not None and not code.of_rows and code.levels_spec().count == 1:
        lowest = torch.tensor(-int(code.levels.min()), dtype=torch.uint8)
        return Codes(torch.tensor(code.unit), lowest, nearest=quantizer)
    return NearestLevel(quantizer) if isinstance(quantizer, LevelTableQuantizer) else quantizer


def _uniform(quantizer: UniformQuantizer, form: Form) -> Codes | None:
    """None where codes have more than 8 bits, a zero-point is no code, or there are several scales.

    A product cannot take a scale per channel of its input out of the sum, so codes would gain nothing; and OpenVINO
    refuses a whole model that has such a QuantizeLinear.
    """
    zero = 0 if quantizer.zero_point is None else quantizer.zero_point
    if quantizer.bits > _WIDEST or quantizer.scale.numel() != 1 or not 0 <= int(zero) <= 255:
        return None
    scale, zero = quantizer.scale.detach().reshape(()), int(zero)
    low, high = quantizer.code_range
    bounds = None if quantizer.bits == _WIDEST else (float((low - zero) * scale), float((high - zero) * scale))
    if not quantizer.symmetric:
        return Codes(scale, torch.tensor(zero, dtype=torch.uint8), bounds)
    zero_point = torch.tensor(128, dtype=torch.uint8) if form.unsigned else torch.tensor(0, dtype=torch.int8)
    return Codes(scale, zero_point, bounds)
