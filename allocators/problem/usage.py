"""What bits use: mean weight bits, mean activation bits, weight bytes, bit operations and latency, as in QUANTITIES.

    BOPs = sum_l MACs_l * b_W * b_A    (the cost that Mix-QViT equalises in its "*" rows)

An attention matmul has no weight: both its operands take the activation's bits, unless the left one has its own. An
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

    Attributes:
        rates: float64 [4, L], whole numbers: what one bit of a layer adds (one bit squared for bit operations).
        divisors: float64 [5]: usage = sum of rate * bits / divisor; of nanoseconds / divisor for the latency.
        matmul: bool [L]: both operands are activations.
        fixed_bits: int64 [L]: bits of an activation that is not allocated.
        left_bits: int64 [L]: bits of the left operand of a matmul where they are its own, else 0.
        latency: None where it is not known, and counts nothing.
    """

    rates: FloatArray
    divisors: FloatArray
    matmul: BoolArray
    fixed_bits: IntArray
    left_bits: IntArray
    latency: Latency | None

    @classmethod
    def of(
        cls,
        weight_elements: IntArray,
        activation_elements: IntArray,
        macs: IntArray,
        matmul: BoolArray,
        fixed_bits: IntArray,
        left_bits: IntArray,
        budget: Budget | None,
        latency: Latency | None,
    ) -> Meter:
        """The meter of a table, averaging as `budget` asks (by elements without one).

        Raises BudgetError for a budget of latency without a table of it.
        """
        if budget is not None and budget.latency_ms is not None and latency is None:
            raise BudgetError(
                f"the budget {str(budget)!r} limits the latency, and no times have been measured: put MeasureLatency "
                f"before AllocateBits, as recipes do, or give CostTable its latency_ms"
            )
        means = (budget.weight_mean, budget.activation_mean) if budget else ("elements", "elements")
        shares = [
            np.sign(elements) if mean == "layers" else elements
            for elements, mean in zip((weight_elements, activation_elements), means, strict=True)
        ]
        rates = np.stack([*shares, weight_elements, macs]).astype(np.float64)
        divisors = np.array([max(rates[0].sum(), 1.0), max(rates[1].sum(), 1.0), 8.0, 1.0, NANOSECONDS_PER_MS])
        return cls(rates, divisors, matmul, fixed_bits, left_bits, latency)

    def use(self, layer: int | slice, weight_bits: IntArray, activation_bits: IntArray) -> FloatArray:
        """What a layer (or a slice of them) adds to each quantity, float64 [5, ...]; the bits broadcast."""
        return self._raw(layer, weight_bits, activation_bits) / self.divisors.reshape(-1, 1)

    def sums(self, weight_bits: IntArray, activation_bits: IntArray) -> FloatArray:
        """The usage of all layers together, float64 [5]; bits are int64 [L]; divided last, so whole bits stay whole."""
        found: FloatArray = self._raw(slice(None), weight_bits, activation_bits).sum(axis=1) / self.divisors
        return found

    def total(self, weight_bits: IntArray, activation_bits: IntArray) -> dict[str, float]:
        """The same by name, without a latency that is not known."""
        named = dict(zip(QUANTITIES, self.sums(weight_bits, activation_bits).tolist(), strict=True))
        if self.latency is None:
            del named["latency_ms"]
        return named

    def _raw(self, layer: int | slice, weight_bits: IntArray, activation_bits: IntArray) -> FloatArray:
        activation_operand = np.where(activation_bits > 0, activation_bits, self.fixed_bits[layer])
        weight_operand = np.where(weight_bits > 0, weight_bits, FLOAT_BITS)
        weight_operand = np.where(self.matmul[layer], activation_operand, weight_operand)
        weight_operand = np.where(self.left_bits[layer] > 0, self.left_bits[layer], weight_operand)
        rates = self.rates[:, layer].reshape(4, -1)
        bits = np.stack([weight_bits, activation_bits, weight_bits, weight_operand * activation_operand])
        raw: FloatArray = rates * bits
        times = np.zeros_like(raw[0]) if self.latency is None else self.latency.at(layer, weight_bits, activation_bits)
        return np.concatenate([raw, np.broadcast_to(times, raw[0].shape)[None]])
