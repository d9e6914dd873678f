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

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fxquant.checks.untrusted import FLAG, Rule, whole
from fxquant.quantizers.family import STEPS, Family, Proposals, Statistics, joined, midpoints
from fxquant.quantizers.quantizer import Quantizer, as_scale


class ShiftedRegionsQuantizer(Quantizer):
    """Three regions with scales scale, scale * 2^shift_small and scale * 2^shift_large.

    Args:
        bits: width of the codes, the bits that say the region and the sign included.
        scale: the scale of the finest region, s0; float32 ().
        shift_small: the scale of the region of small values is scale * 2^shift_small.
        shift_large: the scale of the region of large values is scale * 2^shift_large.
        negative: whether codes are kept for negative values, which takes a sign bit.
    """

    kind = "shifted-regions"
    rules: ClassVar[Mapping[str, Rule] | None] = {"shift_small": whole(), "shift_large": whole(), "negative": FLAG}

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


def opt_m(statistics: Statistics, bits: int) -> Proposals:
    """OPT-m: m1 from the range (eq. 7), every m0 < m1 (eq. 8) with 100 base scales each, chosen jointly.

    Where the largest value lies far above the 99.95th percentile (massive activations), the m1 that reaches it is tried
    as well: eq. 7 would clip it whatever the base scale.
    """
    x_up = max(statistics.moments.quantile(0.9995), 1e-12)
    small_max, large_max = magnitudes(bits, negative=True)
    x_low = min(statistics.mean_image_minimum, -1e-12)
    tables = []
    for top in (x_up, statistics.largest_magnitude):
        shift_large = min(max(round(math.log2((top / large_max) / (-x_low / max(small_max, 1)))), 1), 16)
        # The paper's (0, 1.2 max|X| / 2^(b-1)] steps are for a scale that covers the large region; s0 is 2^m1 finer.
        bases = statistics.largest_magnitude * 1.2 / 2 ** (bits - 1 + shift_large) * np.arange(1, STEPS + 1) / STEPS
        tables.append(_regions([(base, m0) for m0 in range(shift_large) for base in bases], shift_large, bits, True))
        if statistics.largest_magnitude < 4 * x_up:
            break
    return joined(tables)


def twin_gelu(statistics: Statistics, bits: int) -> Proposals:
    """V-2SF post-GELU: a signed small region and a positive large one 2^3 coarser."""
    bases = statistics.largest_magnitude * 1.2 / 2 ** (bits - 1 + 3) * np.arange(1, STEPS + 1) / STEPS
    # Small tensors of large outliers want a base scale well above the covering one divided by 8.
    bases = np.concatenate([bases, bases * 8])
    return _regions([(base, 0) for base in bases], 3, bits, negative=True)


def opt_m_below_8(statistics: Statistics, bits: int) -> Proposals:
    """OPT-m once Greedy MP has lowered a tensor (MPTQ-ViT, section 3.3); at 8 bits, where it starts, still V-2SF."""
    return twin_gelu(statistics, bits) if bits == 8 else opt_m(statistics, bits)


def twin_softmax(statistics: Statistics, bits: int) -> Proposals:
    """V-2SF post-Softmax: two unsigned regions, the large one 2^m coarser, m from 1 to 8 by search."""
    top = statistics.largest_magnitude / (2 ** (bits - 1) - 1)
    tables = []
    for shift in range(1, 9):
        bases = top / 2**shift * np.linspace(0.1, 1.2, STEPS // 4)
        tables.append(_regions([(base, 0) for base in bases], shift, bits, negative=False))
    return joined(tables)


def _regions(pairs: list[tuple[float, int]], shift_large: int, bits: int, negative: bool) -> Proposals:
    small_max, large_max = magnitudes(bits, negative)
    bases = np.array([base for base, _ in pairs])
    steps = np.array([2.0**small for _, small in pairs])
    small = steps[:, None] * np.arange(0, small_max + 1)
    large = np.broadcast_to(2.0**shift_large * np.arange(0, large_max + 1), (len(pairs), large_max + 1))
    # Large levels below the small region's top are never used: the boundary lies above it.
    large = np.where(large > small[:, -1:], large, small[:, -1:])
    below = np.broadcast_to(np.arange(-small_max, 0.0), (len(pairs), small_max)) if negative else small[:, :0]
    levels = bases[:, None] * np.concatenate([below, small, large], axis=1)

    def build(index: int) -> Quantizer:
        base, shift_small = pairs[index]
        return ShiftedRegionsQuantizer(bits, float(base), shift_small, shift_large, negative)

    return Proposals(levels, midpoints(levels), build)


FAMILIES = (
    Family("opt-m", opt_m, byte_bits=8),
    Family("opt-m-below-8", opt_m_below_8, byte_bits=8),
    Family("twin-gelu", twin_gelu, byte_bits=8),
    Family("twin-softmax", twin_softmax, byte_bits=8),
)
