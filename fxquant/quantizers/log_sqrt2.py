"""Log-sqrt2 quantization of post-Softmax values (RepQ-ViT, ICCV 2023): levels d 2^(-k/2), and zero.

The published code clamps codes to 2^b - 1 and sets larger ones to zero, 2^b + 1 levels in all; here the last of the 2^b
codes is zero. Odd codes carry a factor sqrt(2) per element, so this is not an integer GEMM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxquant.checks.untrusted import Rule
from fxquant.quantizers.family import Family, Proposals, Statistics, scaled, shrinking
from fxquant.quantizers.level_table import LevelTableQuantizer


class LogSqrt2Quantizer(LevelTableQuantizer):
    """Powers of sqrt(1/2) below `scale` (float32 scalar d, the largest value represented), and zero."""

    kind = "log-sqrt2"
    rules: ClassVar[Mapping[str, Rule] | None] = {}

    def relative_levels(self) -> Tensor:
        """Zero, then 2^(-k/2) for k = 2^bits - 2 .. 0; float32 (2^bits,), ascending."""
        return torch.cat([torch.zeros(1), torch.exp2(-torch.arange(2**self.bits - 2, -1, -1) / 2)])

    @classmethod
    def empty(cls, **arguments: Any) -> LogSqrt2Quantizer:
        """From bits."""
        return cls(int(arguments["bits"]), 1.0)


def log_sqrt2(statistics: Statistics, bits: int) -> Proposals:
    """Powers of sqrt(1/2) below a searched largest value, and zero."""
    relative = LogSqrt2Quantizer(bits, 1.0).relative_levels().double().numpy()
    return scaled(
        relative[None], shrinking(statistics.largest_magnitude), lambda scale, _: LogSqrt2Quantizer(bits, scale)
    )


FAMILIES = (Family("log-sqrt2", log_sqrt2),)
