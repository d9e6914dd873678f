"""One row per quantized layer: what its operands got, what it costs; plain values for a report, a script or JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fxquant.checks.untrusted import FLAG, NOTHING, NUMBER, OBJECT, TEXT, choice, either, listed, record, whole
from fxquant.graph.annotation import Role, Source


@dataclass(frozen=True, slots=True)
class OperandRow:
    """What one operand of a layer got.

    Args:
        source: what it holds; "weight" for the weight.
        elements: how many values the operand has, for one image where it is an activation.
        bits: the width of its codes; None where it stays in float.
        sqnr_db: of the tensor alone, on the calibration images; None where it stays float.
        quantizer: kind of quantizer; None where it stays float.
        pinned: bits fixed by an override or a policy.
    """

    source: str
    elements: int
    bits: int | None = None
    sqnr_db: float | None = None
    quantizer: str | None = None
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class LayerRow:
    """What one layer got.

    Args:
        layer, role, block: the layer's public name, what it is for, and the index of its block.
        macs: multiply-accumulates of one image.
        operands: the weight and the input, the left and the right input of a product, or the only input.
        predicted_loss: of the whole model if only this layer were quantized (nats per image under the Hessian-guided
            metric).
        execution: "simulated" or the integer kernel.
    """

    layer: str
    role: str
    block: int | None
    macs: int
    operands: tuple[OperandRow, ...]
    predicted_loss: float
    execution: str

    @property
    def weight(self) -> OperandRow | None:
        """The weight, None without one."""
        return next((operand for operand in self.operands if operand.source == Source.WEIGHT), None)

    @property
    def inputs(self) -> tuple[OperandRow, ...]:
        """All operands but the weight."""
        return tuple(operand for operand in self.operands if operand.source != Source.WEIGHT)

    @property
    def weight_bits(self) -> int | None:
        """Width of the weight; None where there is none, or it stays float."""
        return None if self.weight is None else self.weight.bits

    @property
    def input_bits(self) -> tuple[int | None, ...]:
        """Widths of the inputs; None where one stays float."""
        return tuple(operand.bits for operand in self.inputs)

    @property
    def activation_bits(self) -> int | None:
        """Width of the inputs, of two that differ the narrower; None where they stay float."""
        return min((bits for bits in self.input_bits if bits is not None), default=None)

    @property
    def activation_elements(self) -> int:
        """Elements of all inputs, of one image."""
        return sum(operand.elements for operand in self.inputs)

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return 0 if self.weight is None else self.weight.elements

    @property
    def pinned(self) -> bool:
        """Whether any operand's bits were fixed by an override or a policy."""
        return any(operand.pinned for operand in self.operands)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the packed weight, scales not counted; 4 per element where it stays float."""
        return self.parameters * (self.weight_bits or 32) / 8

    @property
    def input_sqnr_db(self) -> float | None:
        """Of the inputs together: of the mean of their noise-to-signal ratios; None where all stay float."""
        ratios = [10 ** (-operand.sqnr_db / 10) for operand in self.inputs if operand.sqnr_db is not None]
        return -10 * math.log10(sum(ratios) / len(ratios)) if ratios else None

    @property
    def input_quantizers(self) -> str | None:
        """Kinds of the inputs' quantizers, such as "row-log x symmetric"; None where all stay float."""
        return " x ".join(dict.fromkeys(o.quantizer for o in self.inputs if o.quantizer is not None)) or None

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON values."""
        values = asdict(self)
        return {**values, "operands": list(values["operands"])}

    @classmethod
    def from_dict(cls, values: Any) -> LayerRow:
        """Inverse of `to_dict`; reads rows from before operands as well. Raises ArtefactError for anything else."""
        if type(values) is dict and "operands" not in values:
            values = _without_operands(values)
        read = record(values, _ROW, "a layer row")
        operands = tuple(OperandRow(**record(item, _OPERAND, "an operand of a layer row")) for item in read["operands"])
        return cls(**{**read, "operands": operands})


_BITS, _TEXT, _DECIBEL = (either(NOTHING, kind) for kind in (whole(1, 32), TEXT, NUMBER))
_OPERAND = {
    "source": choice(*map(str, Source)), "elements": whole(), "bits": _BITS, "sqnr_db": _DECIBEL, "quantizer": _TEXT,
    "pinned": FLAG,
}  # fmt: skip
_ROW = {
    "layer": TEXT, "role": choice(*map(str, Role)), "block": either(NOTHING, whole(0, 10**6)), "macs": whole(),
    "operands": listed(OBJECT, longest=2, shortest=1), "predicted_loss": NUMBER, "execution": TEXT,
}  # fmt: skip
_OLD_ROW = {
    **{name: _ROW[name] for name in ("layer", "role", "block", "macs", "predicted_loss", "execution")},
    "weight_bits": _BITS, "activation_bits": _BITS, "parameters": whole(), "activation_elements": whole(),
    "weight_sqnr_db": _DECIBEL, "activation_sqnr_db": _DECIBEL, "weight_quantizer": _TEXT,
    "activation_quantizer": _TEXT, "pinned": FLAG,
}  # fmt: skip


def _without_operands(values: dict[str, Any]) -> dict[str, Any]:
    """A row as it was before operands: one width, one ratio and one text for all inputs, `left_` for a left one."""
    old = record(values, _OLD_ROW, "a layer row", {"left_bits": _BITS, "left_elements": whole()})
    pinned, role = old["pinned"], Role(old["role"])
    kinds = (old["activation_quantizer"] or "").split(" x ")
    left_elements = old.get("left_elements", 0)
    rest = (old["activation_bits"], old["activation_sqnr_db"], kinds[-1] or None, pinned)
    operands = [OperandRow(str(Source.OTHER), old["activation_elements"] - left_elements, *rest)]
    if role.is_matmul:
        left = (old.get("left_bits") or rest[0], rest[1], kinds[0] or None, pinned)
        operands.insert(0, OperandRow(str(Source.OTHER), left_elements, *left))
    if role.has_weight:
        weight = (old["weight_bits"], old["weight_sqnr_db"], old["weight_quantizer"], pinned)
        operands.insert(0, OperandRow(str(Source.WEIGHT), old["parameters"], *weight))
    return {**{name: old[name] for name in _ROW if name != "operands"}, "operands": list(map(asdict, operands))}
