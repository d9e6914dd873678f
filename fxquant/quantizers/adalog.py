"""AdaLog: logarithmic quantization with an adaptive base (Wu et al., ECCV 2024).

Level k is s 2^(-floor(k q / 37)) T[k q mod 37], a shift times a small integer: T[j] = round(2^(-j/37) M) / M with
M = 4n - 2, n = 2^(b-1). The base 2^(q/37) is searched, q = 37 being log2. Post-Softmax values have s = 1. Post-GELU
values are shifted by 0.17, below which GELU never falls, and the shift is subtracted again (it folds into the next
layer's bias).

No level of this formula is zero: the smallest stands for all smaller values. The published code sets those to zero that
round to less than it, 2^b + 1 levels in all, more than codes of b bits name. `AdaLogZeroQuantizer` has 2^b, zero in the
place of the smallest power.

A value takes the nearest level; the published code rounds its logarithm, which is never closer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxquant.checks.untrusted import NUMBER, Rule, whole
from fxquant.quantizers.family import STEPS, Family, Proposals, Statistics, midpoints, scaled
from fxquant.quantizers.level_table import LevelTableQuantizer

DENOMINATOR = 37
BASES = range(10, 139)
GELU_SHIFT = 0.16997124254703522


class AdaLogQuantizer(LevelTableQuantizer):
    """Powers of 2^(-base / 37) below `scale` (float32 scalar), less `offset`.

    Args:
        bits: width; the table has at most 2^bits levels.
        scale: the largest level before the offset is taken off, a float32 scalar.
        base: integer q from 10 to 138.
        offset: what is subtracted from every level.
    """

    kind = "adalog"
    rules: ClassVar[Mapping[str, Rule] | None] = {"base": whole(0, 1000), "offset": NUMBER}

    def __init__(self, bits: int, scale: Tensor | float, base: int, offset: float = 0.0) -> None:
        super().__init__(bits, scale, offset)
        if base not in BASES:
            raise ValueError(f"the base of AdaLog is an integer from {BASES[0]} to {BASES[-1]}, not {base}")
        self.base = base

    def relative_levels(self) -> Tensor:
        """See the module; float32 (2^bits,), ascending."""
        return torch.from_numpy(self.table(self.bits, self.base)).float()

    @staticmethod
    def table(bits: int, base: int) -> NDArray[np.float64]:
        """The levels for scale 1, float64 (2^bits,), ascending."""
        return adalog_levels(bits, base)

    def settings(self) -> dict[str, Any]:
        """Kind, bits, base and offset."""
        return {**super().settings(), "base": self.base, "offset": self.offset}

    @classmethod
    def empty(cls, **arguments: Any) -> Self:
        """From bits, base and offset."""
        return cls(int(arguments["bits"]), 1.0, int(arguments["base"]), float(arguments["offset"]))


class AdaLogZeroQuantizer(AdaLogQuantizer):
    """Zero and the 2^bits - 1 largest of these levels, less `offset`; the arguments are those of `AdaLogQuantizer`."""

    kind = "adalog-zero"

    @staticmethod
    def table(bits: int, base: int) -> NDArray[np.float64]:
        """The levels for scale 1, float64 (2^bits,), ascending from zero."""
        return np.concatenate([np.zeros(1), adalog_levels(bits, base)[1:]])


def adalog_levels(bits: int, base: int) -> NDArray[np.float64]:
    """The 2^bits levels for scale 1, ascending."""
    shift, remainder = np.divmod(np.arange(2**bits - 1, -1, -1) * base, DENOMINATOR)
    whole = 4 * 2 ** (bits - 1) - 2
    mantissa = np.rint(np.exp2(-remainder / DENOMINATOR) * whole) / whole
    return np.asarray(np.exp2(-shift.astype(np.float64)) * mantissa)


def adalog_softmax(statistics: Statistics, bits: int, kind: type[AdaLogQuantizer] = AdaLogQuantizer) -> Proposals:
    """AdaLog post-Softmax: every base, below 1 (the published scale) and below the largest value seen.

    Args:
        statistics: of the values.
        bits: of the codes.
        kind: whose tables are proposed, with a zero or without.
    """
    relative = np.stack([kind.table(bits, base) for base in BASES])
    scales = np.array([statistics.largest_magnitude, 1.0])
    return scaled(relative, scales, lambda scale, row: kind(bits, scale, BASES[row]))


def adalog_zero_softmax(statistics: Statistics, bits: int) -> Proposals:
    """AdaLog post-Softmax with a zero in the place of the smallest level."""
    return adalog_softmax(statistics, bits, AdaLogZeroQuantizer)


def log_int_softmax(statistics: Statistics, bits: int) -> Proposals:
    """FQ-ViT's log2 post-Softmax: powers of two from 1 down, without a zero; nothing to search.

    Its integer logarithm carries at 1.5 times a power of two, which is the nearest level, as everywhere here.
    """
    levels = adalog_levels(bits, DENOMINATOR)[None]
    return Proposals(levels, midpoints(levels), lambda index: AdaLogQuantizer(bits, 1.0, DENOMINATOR))


def adalog_gelu(statistics: Statistics, bits: int, kind: type[AdaLogQuantizer] = AdaLogQuantizer) -> Proposals:
    """AdaLog post-GELU: values shifted to be positive; bases and scales jointly, fewer of both at higher widths.

    Args:
        statistics, bits, kind: see `adalog_softmax`.
    """
    thinning = max(1, 2 ** (bits - 5))
    bases = BASES[::thinning]
    relative = np.stack([kind.table(bits, base) for base in bases])
    scales = (max(statistics.maximum, 0.0) + GELU_SHIFT) * np.linspace(0.02, 1.0, STEPS // min(thinning, 4))
    return scaled(relative, scales, lambda s, row: kind(bits, s, bases[row], GELU_SHIFT), GELU_SHIFT)


def adalog_zero_gelu(statistics: Statistics, bits: int) -> Proposals:
    """AdaLog post-GELU with a level at the shift, below which nothing falls, in the place of the smallest."""
    return adalog_gelu(statistics, bits, AdaLogZeroQuantizer)


FAMILIES = (
    Family("adalog-softmax", adalog_softmax, coherent=True),
    Family("adalog-gelu", adalog_gelu),
    Family("adalog-zero-softmax", adalog_zero_softmax, coherent=True),
    Family("adalog-zero-gelu", adalog_zero_gelu),
    Family("log-int-softmax", log_int_softmax, coherent=True),
)
