"""Uniform quantization: equally spaced levels, x^ = s (clamp(round(x / s) + z, q_min, q_max) - z).

Symmetric: z = 0, codes -2^(b-1) .. 2^(b-1)-1 (MPTQ-ViT, eq. 2-3). Asymmetric: an integer zero-point z, codes
0 .. 2^b-1. The scale is one number, or one per channel (weights: per output channel; O-2SF: per input channel).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fxquant.checks.untrusted import FLAG, Rule, listed, whole
from fxquant.quantizers.family import STEPS, Family, Proposals, Statistics, midpoints
from fxquant.quantizers.quantizer import Quantizer, as_scale
from fxquant.quantizers.statistics.outlier_channels import outlier_factors, power_of_two_factors


class UniformQuantizer(Quantizer):
    """Symmetric (no zero_point) or asymmetric uniform quantizer.

    Args:
        bits: width of the codes.
        scale: float32, shape () or broadcastable to the input.
        zero_point: the code of zero, int32 of the scale's shape; None for a symmetric quantizer.
    """

    kind = "uniform"
    rules: ClassVar[Mapping[str, Rule] | None] = {"symmetric": FLAG, "shape": listed(whole(1, 2**24), longest=4)}

    def __init__(self, bits: int, scale: Tensor | float, zero_point: Tensor | int | None = None) -> None:
        super().__init__(bits)
        self.scale: Tensor
        self.zero_point: Tensor | None
        self.register_buffer("scale", as_scale(scale))
        zero = None if zero_point is None else torch.as_tensor(zero_point, dtype=torch.int32)
        self.register_buffer("zero_point", zero)

    @property
    def symmetric(self) -> bool:
        """Whether zero is code zero."""
        return self.zero_point is None

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        bits = self.widest_bits
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if self.symmetric else (0, 2**bits - 1)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest code, float32 () or, where channels have widths of their own, of the scale's shape."""
        low, high = self.code_range
        return torch.tensor(float(low), device=self.scale.device), torch.tensor(float(high), device=self.scale.device)

    @property
    def reach(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest step from zero that has a code, float32 () or one for each channel that has its own."""
        low, high = self.ends
        if self.zero_point is not None:
            low, high = low - self.zero_point, high - self.zero_point
        return (low.reshape(-1), high.reshape(-1)) if low.ndim else (low, high)

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of x, int32."""
        codes = torch.round(x.float() * (1 / self.scale))
        if self.zero_point is not None:
            codes = codes + self.zero_point
        return codes.clamp(*self.code_range).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of codes, float32."""
        centred = codes if self.zero_point is None else codes - self.zero_point
        return centred * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Same values as quantize then dequantize, without the detour over int32."""
        # In place: torch's own fake quantization is not vectorised, and fresh memory costs more than arithmetic.
        codes = (x.float() * (1 / self.scale)).round_()
        low, high = self.code_range
        if self.zero_point is None:
            return codes.clamp_(low, high).mul_(self.scale).to(x.dtype)
        return codes.add_(self.zero_point).clamp_(low, high).sub_(self.zero_point).mul_(self.scale).to(x.dtype)

    def rescaled(self, scale: Tensor) -> UniformQuantizer:
        """The same codes at other scales, float32 of the scale's shape."""
        return UniformQuantizer(self.bits, scale, self.zero_point)

    def settings(self) -> dict[str, Any]:
        """Kind, bits, symmetry and the shape of the scale."""
        return {**super().settings(), "symmetric": self.symmetric, "shape": list(self.scale.shape)}

    @classmethod
    def empty(cls, **arguments: Any) -> UniformQuantizer:
        """From bits, symmetric and shape."""
        shape = [int(size) for size in arguments["shape"]]
        zero = None if arguments["symmetric"] else torch.zeros(shape, dtype=torch.int32)
        return cls(int(arguments["bits"]), torch.ones(shape), zero)


def symmetric(statistics: Statistics, bits: int) -> Proposals:
    """Symmetric uniform, 100 scales."""
    scales = statistics.largest_magnitude * 1.2 / 2 ** (bits - 1) * np.arange(1, STEPS + 1) / STEPS
    levels = scales[:, None] * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))

    def build(index: int) -> Quantizer:
        scale = torch.tensor(scales[index], dtype=torch.float32)
        factor = statistics.channel_factor
        return UniformQuantizer(bits, scale if factor is None else scale * factor)

    return Proposals(levels, midpoints(levels), build)


def symmetric_min_max(statistics: Statistics, bits: int) -> Proposals:
    """Symmetric uniform, the scale that just covers the largest magnitude; nothing to search."""
    scales = np.array([statistics.largest_magnitude / (2 ** (bits - 1) - 1)])
    levels = scales[:, None] * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    return Proposals(levels, midpoints(levels), lambda index: UniformQuantizer(bits, float(scales[index])))


def asymmetric(statistics: Statistics, bits: int) -> Proposals:
    """Asymmetric uniform with an integer zero-point: both ends of the range shrink independently, 20 x 20 pairs."""
    shrink = np.linspace(0.05, 1.0, 20)
    low, high = np.meshgrid(min(statistics.minimum, 0.0) * shrink, max(statistics.maximum, 0.0) * shrink)
    top = 2**bits - 1
    scales = np.maximum(high - low, statistics.largest_magnitude * 1e-6).ravel() / top
    zeros = np.clip(np.rint(-low.ravel() / scales), 0, top)
    levels = scales[:, None] * (np.arange(top + 1) - zeros[:, None])
    return Proposals(
        levels, midpoints(levels), lambda index: UniformQuantizer(bits, float(scales[index]), int(zeros[index]))
    )


def asymmetric_min_max(statistics: Statistics, bits: int) -> Proposals:
    """Asymmetric uniform with an integer zero-point, the scale that just covers all values; nothing to search."""
    low, top = min(statistics.minimum, 0.0), 2**bits - 1
    scale = max(max(statistics.maximum, 0.0) - low, 1e-12) / top
    zero = int(np.clip(np.rint(-low / scale), 0, top))
    levels = scale * (np.arange(top + 1) - zero)[None]
    return Proposals(levels, midpoints(levels), lambda index: UniformQuantizer(bits, scale, zero))


FAMILIES = (
    Family("symmetric", symmetric, byte_bits=8, is_uniform=True),
    Family("symmetric-min-max", symmetric_min_max, byte_bits=8, is_uniform=True),
    Family("asymmetric", asymmetric, byte_bits=8, is_uniform=True),
    Family("asymmetric-min-max", asymmetric_min_max, byte_bits=8, is_uniform=True),
    Family("o-2sf", symmetric, by_channel=outlier_factors),
    Family("ptf", symmetric, by_channel=power_of_two_factors),
)
