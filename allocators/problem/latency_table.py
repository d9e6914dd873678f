"""Predicted times as a table by layer and pair of widths, and how it is read.

    latency = sum_l t_l(W_l, A_l),    t_l(w, a) <= t_l(w', a') for all w <= w', a <= a'

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

    Attributes:
        nanoseconds: float64 [L, W, A].
        weight_column: int64 [bits + 1]: the column of a weight width; 0 bits, an absent operand, take the first.
        activation_column: the same of an activation width.
    """

    nanoseconds: FloatArray
    weight_column: IntArray
    activation_column: IntArray

    @classmethod
    def of(cls, latency_ms: FloatArray, weight_bits: Sequence[int], activation_bits: Sequence[int]) -> Self:
        """The reader of a table in ms."""
        columns = [
            np.maximum(np.searchsorted(bits, np.arange(bits[-1] + 1), side="right") - 1, 0)
            for bits in (weight_bits, activation_bits)
        ]
        return cls(np.rint(latency_ms * NANOSECONDS_PER_MS), *columns)

    def at(self, layer: int | slice, weight_bits: IntArray, activation_bits: IntArray) -> FloatArray:
        """Nanoseconds of a layer (or a slice of them); the bits broadcast."""
        layers = np.arange(len(self.nanoseconds))[layer]
        found: FloatArray = self.nanoseconds[
            layers, self.weight_column[weight_bits], self.activation_column[activation_bits]
        ]
        return found


def rising(latency: FloatArray) -> FloatArray:
    """The least table [..., W, A] that is nowhere below this one and never falls with a width."""
    found: FloatArray = np.maximum.accumulate(np.maximum.accumulate(latency, axis=-1), axis=-2)
    return found


def check_latency(layers: Sequence[str], latency_ms: FloatArray) -> None:
    """Raise SensitivityError, naming the layer, unless times are finite, not negative and never fall with a width."""
    is_bad = ~np.isfinite(latency_ms) | (latency_ms < 0)
    is_bad |= np.nan_to_num(rising(latency_ms), posinf=0.0) > np.nan_to_num(latency_ms, posinf=0.0)
    for layer, weight, activation in np.argwhere(is_bad)[:1]:
        raise SensitivityError(
            f"latency_ms of layer {layers[layer]!r} at columns {weight}, {activation} is "
            f"{latency_ms[layer, weight, activation]}: times must be finite, >= 0 and not fall with the width; "
            f"use allocators.problem.latency_table.rising"
        )
