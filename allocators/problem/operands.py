"""Views of a cost table: the operands in one place of every layer, and what one layer can choose from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from allocators.problem.arrays import BoolArray, FloatArray, IntArray

Place = Literal["weight", "activation", "left", "right"]
"""What an operand is in its layer: a weight or its input (for a product of two inputs that share their width, both of
them); or one of the two inputs of a product."""

ROWS: dict[str, int] = {"weight": 0, "left": 0, "activation": 1, "right": 1}
"""The row of an assignment in which an operand stands."""


class Side(NamedTuple):
    """One operand of every layer: the first (a weight, or a product's left input) or the second.

    Args:
        places: L of `Place`.
        bits: int64 [C]: the candidate widths, ascending.
        elements: int64 [L]: 0 where the layer has no such operand, or where it stays float.
        cost: float64 [L, C]: predicted loss.
        sqnr_db: float64 [L, C]: signal to quantization noise, in dB.
        allowed: bool [L, C].
    """

    places: tuple[Place, ...]
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
    """The allowed pairs of widths of one layer, as arrays of length P (0 bits and column -1: none).

    Args:
        columns: int64 [2, P]: columns of the table, of the first and the second operand.
        bits: int64 [2, P]: their widths.
        cost: float64 [P]: both operands' costs.
        usage: float64 [5, P]: what each pair adds to QUANTITIES.
    """

    columns: IntArray
    bits: IntArray
    cost: FloatArray
    usage: FloatArray

    def taken(self, pairs: Sequence[int]) -> Choices:
        """These pairs only, in this order."""
        picked = np.array(pairs, dtype=np.int64)
        return Choices(self.columns[:, picked], self.bits[:, picked], self.cost[picked], self.usage[:, picked])
