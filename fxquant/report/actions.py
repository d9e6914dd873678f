"""From analysis to action: the layers that hurt most, as overrides that `fxquant.compile` and the CLI accept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from allocators.allocation import Allocation
from fxquant.graph.annotation import Source
from fxquant.report.totals import bit_operations
from fxquant.runtime.layer_row import LayerRow, OperandRow

_WIDEST, _STEP = 8, 2
CANDIDATES = tuple(range(2, _WIDEST + 1))
"""Widths that may be asked for where nothing else is known."""


@dataclass(frozen=True)
class Action:
    """Raise one layer's bits, or one operand's.

    Args:
        layer: its name; of inputs with widths of their own, with ".left" or ".right".
        bits: for all operands that it names, or (weight bits, activation bits).
        loss_share: the layer's share of the summed predicted loss.
        extra_bytes, extra_bit_operations: what the change costs, before the allocator saves it elsewhere.
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


def actions_for(
    layers: Sequence[LayerRow], allocation: Allocation | None, candidates: Sequence[int] = CANDIDATES, count: int = 3
) -> list[Action]:
    """The layers with the largest predicted loss that can still be raised, worst first, each raised by two bits.

    Args:
        layers: one row per quantized layer.
        allocation: the bits and how they were found; None for pipelines that allocate nothing.
        candidates: widths that may be asked for, ascending; the next one is taken where two bits more is none of them.
        count: how many layers are listed at most.
    """
    total = sum(row.predicted_loss for row in layers)
    found: list[Action] = []
    for row in sorted(layers, key=lambda row: -row.predicted_loss):
        action = _raise(row, allocation, total, candidates)
        if action is not None and len(found) < count:
            found.append(action)
    return found


def _raise(row: LayerRow, allocation: Allocation | None, total: float, candidates: Sequence[int]) -> Action | None:
    """The layer with all its widths raised; of inputs with widths of their own the narrower one alone, by its name.

    Args:
        row: what the layer got.
        allocation: the bits and how they were found.
        total: the predicted loss of all layers.
        candidates: widths that may be asked for.
    """
    if row.predicted_loss <= 0:
        return None
    names = [f"{row.layer}.{place}" for place in ("left", "right")]
    is_split = allocation is not None and names[0] in allocation.activation_bits
    if is_split:
        index = min((0, 1), key=lambda index: row.operands[index].bits or _WIDEST)
        chosen, name = [index], names[index]
    else:
        chosen, name = [i for i, operand in enumerate(row.operands) if _is_free(row, operand, allocation)], row.layer
    operands = [_raised(operand, candidates) if i in chosen else operand for i, operand in enumerate(row.operands)]
    after = replace(row, operands=tuple(operands))
    if after == row:
        return None
    present = [operand.bits for index, operand in enumerate(operands) if index in chosen and operand.bits is not None]
    return Action(
        layer=name,
        bits=present[0] if len(set(present)) == 1 else (present[0], present[1]),
        loss_share=row.predicted_loss / total,
        extra_bytes=after.weight_bytes - row.weight_bytes,
        extra_bit_operations=bit_operations(after) - bit_operations(row),
    )


def _is_free(row: LayerRow, operand: OperandRow, allocation: Allocation | None) -> bool:
    """Whether its width is a choice: an image's is none."""
    if allocation is None or operand.bits is None:
        return operand.bits is not None
    of_weight = operand.source == Source.WEIGHT
    return row.layer in (allocation.weight_bits if of_weight else allocation.activation_bits)


def _raised(operand: OperandRow, candidates: Sequence[int]) -> OperandRow:
    bits = operand.bits or _WIDEST
    wider = [width for width in candidates if bits < width <= _WIDEST]
    return replace(operand, bits=next((width for width in wider if width >= bits + _STEP), max([bits, *wider])))
