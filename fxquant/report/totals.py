"""What a whole model weighs and costs, against float32 and against 8 bits everywhere.

    model bytes    = sum_l n_l b_l / 8 + 4 (n - sum_l n_l)      (n_l: weight elements of layer l, n: all parameters)
    bit operations = sum_l MACs_l * b_0l * b_1l                 (widths of the two operands of layer l)

Scales and zero-points are not counted here; `fxquant inspect` shows what they take in a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from allocators.allocation import Allocation
from fxquant.report.grid import mean_activation_bits, mean_weight_bits, tiles_of
from fxquant.runtime.layer_row import LayerRow

_FLOAT_BITS = 32


@dataclass(frozen=True)
class Totals:
    """Sums over a model.

    Args:
        parameters: elements of all tensors of the model.
        quantized_parameters: elements of quantized weights.
        float_bytes: what the whole model takes in float32.
        model_bytes: packed weights plus everything that stays float32.
        weight_bytes: what the quantized weights alone take, packed at their bits.
        mean_weight_bits, mean_activation_bits: averaged as the budget asks, by elements without a budget; None where
            nothing is quantized.
        macs: multiply-accumulates of one image, of quantized layers.
        bit_operations: multiply-accumulates times the bits of both factors, summed over layers, for one image.
        float_bit_operations: the same with 32 bits for both factors.
        int8_bit_operations: the same with 8 bits for both factors.
        compression: float_bytes / model_bytes.
        predicted_loss: the predicted losses of all operands, summed.
    """

    parameters: int
    quantized_parameters: int
    float_bytes: float
    model_bytes: float
    weight_bytes: float
    mean_weight_bits: float | None
    mean_activation_bits: float | None
    macs: int
    bit_operations: float
    float_bit_operations: float
    int8_bit_operations: float
    compression: float
    predicted_loss: float

    @classmethod
    def of(cls, layers: Sequence[LayerRow], allocation: Allocation | None, card: Mapping[str, Any]) -> Totals:
        """Totals of the rows; `card["parameters"]` counts what no row has (biases, norms, embeddings).

        Args:
            layers: one row per quantized layer.
            allocation: says how means are averaged; None: by elements.
            card: the protocol card of the compiled model.
        """
        weighted = [row for row in layers if row.weight_bits is not None]
        quantized = sum(row.parameters for row in weighted)
        parameters = max(int(card.get("parameters") or 0), quantized)
        weight_bytes = sum(row.weight_bytes for row in weighted)
        model_bytes = weight_bytes + 4 * (parameters - quantized)
        macs = sum(row.macs for row in layers)
        usage = {} if allocation is None else allocation.usage
        tiles = tiles_of(layers)
        return cls(
            parameters=parameters,
            quantized_parameters=quantized,
            float_bytes=4.0 * parameters,
            model_bytes=model_bytes,
            weight_bytes=weight_bytes,
            mean_weight_bits=usage.get("mean_weight_bits") or mean_weight_bits(tiles),
            mean_activation_bits=usage.get("mean_activation_bits") or mean_activation_bits(tiles),
            macs=macs,
            bit_operations=float(sum(bit_operations(row) for row in layers)),
            float_bit_operations=float(macs * _FLOAT_BITS**2),
            int8_bit_operations=float(macs * 8**2),
            compression=4 * parameters / model_bytes if model_bytes else 1.0,
            predicted_loss=sum(row.predicted_loss for row in layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON values."""
        return asdict(self)


def bit_operations(row: LayerRow) -> int:
    """Bit operations of one layer for one image; 32 bits for what is not quantized."""
    return row.macs * math.prod(operand.bits or _FLOAT_BITS for operand in row.operands)
