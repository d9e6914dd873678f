"""Regions whose scales are powers of two apart: OPT-m, and TSPTQ-ViT's V-2SF for post-GELU and post-Softmax values.

Negative values use scale s0, small positive ones s1 = s0 2^m0, large positive ones s2 = s0 2^m1 (MPTQ-ViT, eq. 6).
With b bits, one region bit and one sign bit: negative and small magnitudes up to 2^(b-2)-1, large up to 2^(b-1)-1.

- OPT-m: m0 and m1 from the data. - V-2SF post-GELU: m0 = 0, m1 = 3 (large scale fixed at 8 times the small one).
- V-2SF post-Softmax: no negative values, so the sign bit is free: small and large magnitudes up to 2^(b-1)-1.

All levels are integers times s0. A value takes the nearest level; the paper decides by the truncated code instead,
which is never closer (a value just under the boundary is clipped to the last small level even where the first large
one is nearer).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.quantizers.quantizer import Quantizer, as_scale


class ShiftedRegionsQuantizer(Quantizer):
    """Three regions with scales scale, scale * 2^shift_small and scale * 2^shift_large.

    Args:
        bits: width of the codes, the bits that say the region and the sign included.
        scale: float32 scalar s0.
        shift_small: the scale of the region of small values is scale * 2^shift_small.
        shift_large: the scale of the region of large values is scale * 2^shift_large.
        negative: whether codes are kept for negative values, which takes a sign bit.
    """

    kind = "shifted-regions"

    def __init__(
        self, bits: int, scale: Tensor | float, shift_small: int, shift_large: int, negative: bool = True
    ) -> None:
        super().__init__(bits)
        self.scale: Tensor
        self.register_buffer("scale", as_scale(scale))
        self.shift_small, self.shift_large, self.negative = shift_small, shift_large, negative
        self.small_max, self.large_max = magnitudes(bits, negative)
        self.small_step, self.large_step = 2**shift_small, 2**shift_large
        small_top = self.small_max * self.small_step
        large_first = (small_top // self.large_step + 1) * self.large_step
        self.boundary = (small_top + large_first) / 2

    def quantize(self, x: Tensor) -> Tensor:
        """Integer multiples of the scale s0, int32; one of at most 2^bits values."""
        return self._multiples(x).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of multiples of s0, float32."""
        return codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Same values as quantize then dequantize, without the detour over int32."""
        return self._multiples(x).mul_(self.scale).to(x.dtype)

    def _multiples(self, x: Tensor) -> Tensor:
        # In place wherever possible: fresh memory costs more here than arithmetic. Comparisons are not vectorised: what
        # is below the boundary is 0 among the large ones, and the small ones end below it.
        units = x.float() * (1 / self.scale)
        large = functional.threshold(units, self.boundary, 0.0).mul_(1 / self.large_step).round_()
        large = large.clamp_(max=self.large_max).mul_(self.large_step)
        small = (units * (1 / self.small_step)).round_().clamp_(0, self.small_max).mul_(self.small_step)
        multiples: Tensor = torch.maximum(small, large)
        return multiples.add_(units.round_().clamp_(-self.small_max, 0)) if self.negative else multiples

    def settings(self) -> dict[str, Any]:
        """Kind, bits, shifts and sign."""
        shifts = {"shift_small": self.shift_small, "shift_large": self.shift_large}
        return {**super().settings(), **shifts, "negative": self.negative}

    @classmethod
    def empty(cls, **arguments: Any) -> ShiftedRegionsQuantizer:
        """From bits, shifts and sign."""
        shifts = int(arguments["shift_small"]), int(arguments["shift_large"])
        if not 0 <= shifts[0] <= shifts[1] <= 24:
            raise ValueError(f"shifts {shifts} are not 0 <= small <= large <= 24")
        return cls(int(arguments["bits"]), 1.0, *shifts, bool(arguments["negative"]))


def magnitudes(bits: int, negative: bool) -> tuple[int, int]:
    """Largest magnitude of the small (and negative) region and of the large region, in units of their scales."""
    return 2 ** (bits - 2 if negative else bits - 1) - 1, 2 ** (bits - 1) - 1
