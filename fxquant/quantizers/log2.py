"""Logarithmic quantization of post-Softmax values: x^ = d 2^-k, k = round(-log2(x / d)).

Codes 0 .. 2^b-2 are exponents, code 2^b-1 is zero (FQ-ViT's log-int-softmax keeps no zero; without one, the thousands
of near-zero attention values of a row add up). Values are powers of two times d: an integer GEMM with shifts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fxquant.checks.untrusted import Rule
from fxquant.quantizers.family import Family, Proposals, Statistics, shrinking
from fxquant.quantizers.quantizer import Quantizer, as_scale

_CARRY = 0x800000 - 0x3504F3
_EXPONENT = -0x800000


class Log2Quantizer(Quantizer):
    """Powers of two below `scale` (float32 scalar d, the largest value represented), and zero."""

    kind = "log2"
    rules: ClassVar[Mapping[str, Rule] | None] = {}

    def __init__(self, bits: int, scale: Tensor | float) -> None:
        super().__init__(bits)
        self.scale: Tensor
        self.register_buffer("scale", as_scale(scale))

    def quantize(self, x: Tensor) -> Tensor:
        """Exponents, int32 in 0 .. 2^bits-1, the last one meaning zero."""
        zero = 2**self.bits - 1
        ratio = (x.float() / self.scale).clamp_min(2.0 ** -(zero + 1))
        return torch.round(-torch.log2(ratio)).clamp(0, zero).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of exponents, float32."""
        value = torch.exp2(-codes.float()) * self.scale
        return torch.where(codes == 2**self.bits - 1, 0.0, value)

    def forward(self, x: Tensor) -> Tensor:
        """Same values as quantize then dequantize, up to values within float rounding of a threshold."""
        if torch.compiler.is_exporting():  # ONNX has no operator for the bits of a float
            return self.dequantize(self.quantize(x)).to(x.dtype)
        units = x.float() * (1 / self.scale)
        # The nearest power of two: from a mantissa of sqrt(2) on, the exponent carries; then the mantissa goes.
        units.view(torch.int32).add_(_CARRY).bitwise_and_(_EXPONENT)
        smallest = 2.0 ** -(2**self.bits - 1.5)
        return functional.threshold(units, smallest, 0.0).clamp_(max=1.0).mul_(self.scale).to(x.dtype)

    @classmethod
    def empty(cls, **arguments: Any) -> Log2Quantizer:
        """From bits."""
        return cls(int(arguments["bits"]), 1.0)


def log2(statistics: Statistics, bits: int) -> Proposals:
    """Powers of two below a searched largest value, and zero."""
    scales = shrinking(statistics.largest_magnitude)
    zero = 2**bits - 1
    exponents = np.arange(zero - 1, -1, -1)
    levels = np.concatenate([np.zeros((len(scales), 1)), scales[:, None] * np.exp2(-exponents)], axis=1)
    thresholds = scales[:, None] * np.exp2(-(exponents + 0.5))
    return Proposals(levels, thresholds, lambda index: Log2Quantizer(bits, float(scales[index])))


FAMILIES = (Family("log2", log2, byte_bits=4),)
