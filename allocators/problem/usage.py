"""What bits use: mean weight bits, mean activation bits, weight bytes, bit operations and latency, as in QUANTITIES.

    BOPs = sum_l MACs_l * b_0 * b_1    (the cost that Mix-QViT equalises in its "*" rows)

b_0 and b_1 are the widths of a layer's two operands; tied inputs of a product both have the one that they share. An
operand that is not allocated counts 32 bits, as float does, or what the table says of it (an image comes in 8 bits).
Deliberately not done: the bytes of scales and zero-points, and the cost of layers without MACs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from allocators.problem.arrays import BoolArray, FloatArray, IntArray
from allocators.problem.budget import QUANTITIES, Budget
from allocators.problem.latency_table import NANOSECONDS_PER_MS, Latency
from fxquant.errors import BudgetError

FLOAT_BITS = 32


class Meter(NamedTuple):
    """Turns bits into usage; 0 bits stand for an operand that is absent or stays float.

    Args:
        shares: float64 [2, 2, L], whole numbers: by operand and layer, what one bit adds to the mean of weight bits
            (first) and to that of activation bits.
        weight_elements: int64 [L].
        macs: int64 [L].
        divisors: float64 [5]: usage = sum of rate * bits / divisor; of nanoseconds / divisor for the latency.
        tied: bool [L]: both operands have the width of the second.
        fixed_bits: int64 [2, L]: bits of an operand that is not allocated.
        latency: None where it is not known, and counts nothing.
    """

    shares: FloatArray
    weight_elements: IntArray
    macs: IntArray
    divisors: FloatArray
    tied: BoolArray
    fixed_bits: IntArray
    latency: Latency | None

    @classmethod
    def of(
        cls,
        elements: IntArray,
        is_weight: BoolArray,
        macs: IntArray,
        tied: BoolArray,
        fixed_bits: IntArray,
        budget: Budget | None,
        latency: Latency | None,
    ) -> Meter:
        """The meter of a table, averaging as `budget` asks (by elements without one); see CostTable.

        Args:
            elements: int64 [2, L], see CostTable.
            is_weight: bool [2, L], which operands are weights.
            macs: int64 [L], multiply-accumulates per image.
            tied: bool [L], products whose two inputs share one width.
            fixed_bits: int64 [2, L], bits of operands outside the allocation.
            budget: says how means are averaged; None: by elements.
            latency: times at every pair of widths; None: not known.

        Raises BudgetError for a budget of latency without a table of it.
        """
        if budget is not None and budget.latency_ms is not None and latency is None:
            raise BudgetError(
                f"the budget {str(budget)!r} limits the latency, and no times have been measured: put MeasureLatency "
                f"before AllocateBits, as recipes do, or give CostTable its latency_ms"
            )
        means = (budget.weight_mean, budget.activation_mean) if budget else ("elements", "elements")
        shares = np.stack(
            [
                np.where(counted, np.sign(elements) if mean == "layers" else elements, 0)
                for counted, mean in zip((is_weight, ~is_weight), means, strict=True)
            ]
        ).astype(np.float64)
        totals = np.maximum(shares.sum(axis=(1, 2)), 1.0)
        divisors = np.array([*totals, 8.0, 1.0, NANOSECONDS_PER_MS])
        weight_elements = np.where(is_weight, elements, 0)[0]
        return cls(shares, weight_elements, macs, divisors, tied, fixed_bits, latency)

    def use(self, layer: int | slice, first_bits: IntArray, second_bits: IntArray) -> FloatArray:
        """What a layer (or a slice of them) adds to each quantity, float64 [5, ...]; the bits broadcast.

        Args:
            layer: the index of a layer, or a slice.
            first_bits, second_bits: widths of the first and of the second operand, int64.
        """
        return self._raw(layer, first_bits, second_bits) / self.divisors.reshape(-1, 1)

    def sums(self, first_bits: IntArray, second_bits: IntArray) -> FloatArray:
        """The usage of all layers together, float64 [5, ...]; divided last, so whole bits stay whole.

        first_bits, second_bits: int64 [..., L], of one assignment or of several.
        """
        raw = self._raw(slice(None), first_bits, second_bits).sum(axis=-1)
        found: FloatArray = raw / self.divisors.reshape(-1, *[1] * (raw.ndim - 1))
        return found

    def total(self, first_bits: IntArray, second_bits: IntArray) -> dict[str, float]:
        """The same by name, without a latency that is not known."""
        named = dict(zip(QUANTITIES, self.sums(first_bits, second_bits).tolist(), strict=True))
        if self.latency is None:
            del named["latency_ms"]
        return named

    def _raw(self, layer: int | slice, first_bits: IntArray, second_bits: IntArray) -> FloatArray:
        first = np.where(first_bits > 0, first_bits, self.fixed_bits[0, layer])
        second = np.where(second_bits > 0, second_bits, self.fixed_bits[1, layer])
        first = np.where(self.tied[layer], second, first)
        shares = self.shares[:, :, layer].reshape(2, 2, -1)
        means = [first_share * first_bits + second_share * second_bits for first_share, second_share in shares]
        stored = self.weight_elements[layer] * first_bits.astype(np.float64)
        operations = self.macs[layer] * (first * second).astype(np.float64)
        times = np.zeros_like(stored) if self.latency is None else self.latency.at(layer, first_bits, second_bits)
        raw: FloatArray = np.stack([*means, stored, operations, np.broadcast_to(times, stored.shape)])
        return raw
