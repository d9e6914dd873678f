"""Quantizers that are a table: ascending levels, and the nearest one for every value.

Any 8-bit code passes through such a table at the price of a lookup. Subclasses compute the table from their numbers.
"""

from __future__ import annotations

from torch import Tensor

from fxquant.quantizers.quantizer import Quantizer, as_scale
from fxquant.quantizers.thresholds import thresholds_below


class LevelTableQuantizer(Quantizer):
    """Nearest of at most 2^bits ascending levels. A subclass gives `relative_levels`, the table for scale 1.

    Args:
        bits: width; the table has at most 2^bits levels.
        scale: what a level of 1 is worth, float32 ().
        offset: what is subtracted from every level, so that a table of positive levels covers values from -offset on.
    """

    kind = "level-table"

    def __init__(self, bits: int, scale: Tensor | float, offset: float = 0.0) -> None:
        super().__init__(bits)
        self.scale: Tensor
        self.register_buffer("scale", as_scale(scale))
        self.offset = offset

    def relative_levels(self) -> Tensor:
        """Levels for scale 1 and offset 0, float32 (L,), ascending."""
        raise NotImplementedError(f"{type(self).__name__} has no relative_levels")

    def levels(self) -> Tensor:
        """Every value this quantizer returns, float32 (L,), ascending."""
        return self.relative_levels().to(self.scale.device) * self.scale - self.offset

    def quantize(self, x: Tensor) -> Tensor:
        """Index of the nearest level, int32 in 0 .. L-1."""
        levels = self.levels()
        return thresholds_below(x.float(), (levels[1:] + levels[:-1]) / 2)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of level indices, float32."""
        # The same as levels[codes], several times faster.
        return self.levels().index_select(0, codes.flatten()).reshape(codes.shape)
