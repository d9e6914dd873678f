"""Twin uniform quantization (PTQ4ViT, Yuan et al., ECCV 2022): two uniform ranges of 2^(b-1) codes each.

After softmax, with n = 2^(b-1) - 1: [0, 2^-i) in steps of 2^-i / n, and [2^-i, 1] in steps of 1 / n; i from 0 to 19 is
searched. After GELU: the negative range, down to -0.17, in steps of 0.17 / 2^(b-1); the positive one in searched steps.

Every value belongs to one range. The published code returns the sum of both, which is not the same: 0.9 becomes 1.398
where the ranges meet at 0.5. Deliberately not done: steps whose ratio is a power of two (its section 3.2; the published
code has none either), which integer kernels would need, so these layers stay simulated. V-2SF (`shifted_regions`) has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fxquant.checks.untrusted import FLAG, NUMBER, Rule
from fxquant.quantizers.adalog import GELU_SHIFT
from fxquant.quantizers.family import STEPS, Family, Proposals, Statistics, midpoints
from fxquant.quantizers.level_table import LevelTableQuantizer
from fxquant.quantizers.quantizer import Quantizer

SPLITS = range(20)


class TwinUniformQuantizer(LevelTableQuantizer):
    """Two uniform ranges, a fine and a coarse one.

    Args:
        bits: width of the codes, the bit that says the range included.
        scale: the step of the coarse range, float32 ().
        fine: the step of the fine range, relative to that.
        negative: whether the fine range lies below zero; else from zero up, and the coarse one begins where it ends.
    """

    kind = "twin-uniform"
    rules: ClassVar[Mapping[str, Rule] | None] = {"fine": NUMBER, "negative": FLAG}

    def __init__(self, bits: int, scale: Tensor | float, fine: float, negative: bool) -> None:
        super().__init__(bits, scale)
        if not fine > 0:
            raise ValueError(f"the fine range has steps above 0, not of {fine}")
        self.fine, self.negative = fine, negative

    def relative_levels(self) -> Tensor:
        """See the module; float32 (2^bits,), ascending."""
        return torch.from_numpy(twin_levels(self.bits, self.fine, self.negative)).float()

    def settings(self) -> dict[str, Any]:
        """Kind, bits, the fine step and its side."""
        return {**super().settings(), "fine": self.fine, "negative": self.negative}

    @classmethod
    def empty(cls, **arguments: Any) -> TwinUniformQuantizer:
        """From bits, the fine step and its side."""
        return cls(int(arguments["bits"]), 1.0, float(arguments["fine"]), bool(arguments["negative"]))


def twin_levels(bits: int, fine: float, negative: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The 2^bits levels in coarse steps, float64, ascending; coarse ones within the fine range repeat its end.

    Args:
        bits: width, half of whose codes belong to either range.
        fine: the step of the fine range.
        negative: whether the fine range lies below zero.
    """
    half = 2 ** (bits - 1)
    coarse = np.arange(half, dtype=np.float64)
    if negative:
        return np.concatenate([-fine * np.arange(half, 0, -1), coarse])
    steps = fine * np.arange(half)
    return np.concatenate([steps, np.maximum(coarse, steps[-1])])


def twin_uniform_softmax(statistics: Statistics, bits: int) -> Proposals:
    """PTQ4ViT's twin uniform post-Softmax: the ranges meet at 2^-i, i from 0 to 19 by search."""
    scale = 1 / (2 ** (bits - 1) - 1)
    levels = scale * np.stack([twin_levels(bits, 2.0**-split, False) for split in SPLITS])
    return Proposals(
        levels, midpoints(levels), lambda index: TwinUniformQuantizer(bits, scale, 2.0 ** -SPLITS[index], False)
    )


def twin_uniform_gelu(statistics: Statistics, bits: int) -> Proposals:
    """PTQ4ViT's twin uniform post-GELU: the negative step is fixed, 100 positive ones."""
    half = 2 ** (bits - 1)
    scales = max(statistics.maximum, 1e-12) * 1.2 / (half - 0.5) * np.arange(1, STEPS + 1) / STEPS
    fine = GELU_SHIFT / half / scales
    levels = np.stack([s * twin_levels(bits, f, True) for s, f in zip(scales, fine, strict=True)])

    def build(index: int) -> Quantizer:
        return TwinUniformQuantizer(bits, float(scales[index]), float(fine[index]), True)

    return Proposals(levels, midpoints(levels), build)


FAMILIES = (
    Family("twin-uniform-softmax", twin_uniform_softmax),
    Family("twin-uniform-gelu", twin_uniform_gelu),
)
