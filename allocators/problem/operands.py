"""Views of a cost table: one side of it, and what one layer can choose from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from allocators.problem.arrays import BoolArray, FloatArray, IntArray


class Operand(NamedTuple):
    """One side of the table: the weights or the activations of every layer.

    Attributes:
        name: "weight" or "activation".
        bits: int64 [C]: the candidate widths, ascending.
        elements: int64 [L]: 0 where the layer has no such operand.
        cost: float64 [L, C]: predicted loss.
        sqnr_db: float64 [L, C]: signal to quantization noise, in dB.
        allowed: bool [L, C].
    """

    name: str
    bits: IntArray
    elements: IntArray
    cost: FloatArray
    sqnr_db: FloatArray
    allowed: BoolArray

    def columns(self, layer: int) -> IntArray:
        """The allowed columns of a layer, ascending; [-1] where it has no such operand."""
        return np.flatnonzero(self.allowed[layer]) if self.elements[layer] > 0 else np.array([-1])

    def bits_at(self, columns: IntArray) -> IntArray:
        """The widths of `columns`; 0 for column -1."""
        return np.where(columns >= 0, self.bits[columns], 0)


class Choices(NamedTuple):
    """The allowed (weight, activation) pairs of one layer, as arrays of length P (0 bits and column -1: none).

    Attributes:
        columns: int64 [2, P]: columns of the table.
        bits: int64 [2, P]: weight and activation bits.
        cost: float64 [P]: weight cost plus activation cost.
        usage: float64 [5, P]: what each pair adds to QUANTITIES.
    """

    columns: IntArray
    bits: IntArray
    cost: FloatArray
    usage: FloatArray
