"""From analysis to action: the layers that hurt most, as overrides that `fxquant.compile` and the CLI accept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from allocators.allocation import Allocation
from fxquant.graph.annotation import SOFTMAX
from fxquant.report.totals import bit_operations
from fxquant.runtime.layer_row import LayerRow

_WIDEST, _STEP = 8, 2


@dataclass(frozen=True)
class Action:
    """Raise one layer's bits.

    bits: for both operands, or (weight bits, activation bits). loss_share: the layer's share of the summed predicted
    loss. extra_bytes, extra_bit_operations: what the change costs, before the allocator saves it elsewhere.
    """

    layer: str
    bits: int | tuple[int, int]
    loss_share: float
    extra_bytes: float
    extra_bit_operations: int

    @property
    def python(self) -> str:
        """The keyword argument for `fxquant.compile`."""
        return f'overrides={{"{self.layer}": {self.bits}}}'

    @property
    def command(self) -> str:
        """The option for `fxquant compile`."""
        bits = self.bits if isinstance(self.bits, int) else "/".join(map(str, self.bits))
        return f"--override {self.layer}={bits}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "layer": self.layer,
            "bits": list(self.bits) if isinstance(self.bits, tuple) else self.bits,
            "loss_share": self.loss_share,
            "extra_bytes": self.extra_bytes,
            "extra_bit_operations": self.extra_bit_operations,
            "python": self.python,
            "command": self.command,
        }


def actions_for(layers: Sequence[LayerRow], allocation: Allocation | None, count: int = 3) -> list[Action]:
    """The layers with the largest predicted loss that can still be raised, worst first, each raised by two bits."""
    total = sum(row.predicted_loss for row in layers)
    found: list[Action] = []
    for row in sorted(layers, key=lambda row: -row.predicted_loss):
        action = _raise(row, allocation, total)
        if action is not None and len(found) < count:
            found.append(action)
    return found


def _raise(row: LayerRow, allocation: Allocation | None, total: float) -> Action | None:
    if row.left_bits is not None:
        return _raise_softmax(row, row.left_bits, total)
    weight = row.weight_bits if allocation is None else allocation.weight_bits.get(row.layer)
    activation = row.activation_bits if allocation is None else allocation.activation_bits.get(row.layer)
    raised = [None if bits is None else max(bits, min(bits + _STEP, _WIDEST)) for bits in (weight, activation)]
    if raised == [weight, activation] or row.predicted_loss <= 0:
        return None
    present = [bits for bits in raised if bits is not None]
    after = replace(row, weight_bits=raised[0] or row.weight_bits, activation_bits=raised[1] or row.activation_bits)
    return Action(
        layer=row.layer,
        bits=present[0] if len(set(present)) == 1 else (present[0], present[1]),
        loss_share=row.predicted_loss / total,
        extra_bytes=after.weight_bytes - row.weight_bytes,
        extra_bit_operations=bit_operations(after) - bit_operations(row),
    )


def _raise_softmax(row: LayerRow, bits: int, total: float) -> Action | None:
    """The narrow side of a product of activations is the one to raise."""
    raised = min(bits + _STEP, _WIDEST)
    if raised <= bits or row.predicted_loss <= 0:
        return None
    return Action(
        layer=row.layer + SOFTMAX,
        bits=raised,
        loss_share=row.predicted_loss / total,
        extra_bytes=0,
        extra_bit_operations=bit_operations(replace(row, left_bits=raised)) - bit_operations(row),
    )
