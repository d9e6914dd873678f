"""Predicted times as a table by layer and pair of widths, and how it is read.

    latency = sum_l t_l(b_0l, b_1l),    t_l(b, c) <= t_l(b', c') for all b <= b', c <= c'

So the lowest widths are the fastest, as they use least of every other quantity, and whether a budget can be met is
known before anything is solved. Where a narrower width was measured slower, `rising` counts the wider one as slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from allocators.problem.arrays import FloatArray, IntArray
from fxquant.errors import SensitivityError

NANOSECONDS_PER_MS = 1e6


class Latency(NamedTuple):
    """Times in whole nanoseconds, so that sums are exact.

    Args:
        nanoseconds: float64 [L, C, C].
        column: int64 [bits + 1]: the column of a width; 0 bits, an absent operand, take the first.
    """

    nanoseconds: FloatArray
    column: IntArray

    @classmethod
    def of(cls, latency_ms: FloatArray, bits: Sequence[int]) -> Self:
        """The reader of a table in ms."""
        column = np.maximum(np.searchsorted(bits, np.arange(bits[-1] + 1), side="right") - 1, 0)
        return cls(np.rint(latency_ms * NANOSECONDS_PER_MS), column)

    def at(self, layer: int | slice, first_bits: IntArray, second_bits: IntArray) -> FloatArray:
        """Nanoseconds of a layer (or a slice of them) at the widths of its operands; the bits broadcast.

        Args:
            layer: the index of a layer, or a slice.
            first_bits, second_bits: widths of the first and of the second operand, int64.
        """
        layers = np.arange(len(self.nanoseconds))[layer]
        found: FloatArray = self.nanoseconds[layers, self.column[first_bits], self.column[second_bits]]
        return found


def rising(latency: FloatArray) -> FloatArray:
    """The least table [..., C, C] that is nowhere below this one and never falls with a width."""
    found: FloatArray = np.maximum.accumulate(np.maximum.accumulate(latency, axis=-1), axis=-2)
    return found


def check_latency(layers: Sequence[str], latency_ms: FloatArray) -> None:
    """Raise SensitivityError, naming the layer, unless times are finite, not negative and never fall with a width."""
    is_bad = ~np.isfinite(latency_ms) | (latency_ms < 0)
    is_bad |= np.nan_to_num(rising(latency_ms), posinf=0.0) > np.nan_to_num(latency_ms, posinf=0.0)
    for layer, first, second in np.argwhere(is_bad)[:1]:
        raise SensitivityError(
            f"latency_ms of layer {layers[layer]!r} at columns {first}, {second} is "
            f"{latency_ms[layer, first, second]}: times must be finite, >= 0 and not fall with the width; "
            f"use allocators.problem.latency_table.rising"
        )
