"""One row per quantized layer: what it got, what it costs; plain values that a report, a script or JSON can hold."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from fxquant.checks.untrusted import FLAG, NOTHING, NUMBER, TEXT, Rule, choice, either, record, whole
from fxquant.graph.annotation import Role


@dataclass(frozen=True, slots=True)
class LayerRow:
    """What one layer got.

    Args:
        layer, role, block: as assigned.
        weight_bits, activation_bits: None where it has none or stays float.
        parameters: weight elements.
        macs, activation_elements: per image.
        weight_sqnr_db, activation_sqnr_db: of the tensors alone, on the calibration images.
        predicted_loss: of the whole model if only this layer were quantized (nats per image under the Hessian-guided
            metric).
        weight_quantizer, activation_quantizer: kinds of quantizer.
        execution: "simulated" or the integer kernel.
        pinned: bits fixed by an override or policy.
        left_bits: of a matmul's left input, where it has its own.
        left_elements: of activation_elements, those of that input.
    """

    layer: str
    role: str
    block: int | None
    weight_bits: int | None
    activation_bits: int | None
    parameters: int
    macs: int
    activation_elements: int
    weight_sqnr_db: float | None
    activation_sqnr_db: float | None
    predicted_loss: float
    weight_quantizer: str | None
    activation_quantizer: str | None
    execution: str
    pinned: bool
    left_bits: int | None = None
    left_elements: int = 0

    @property
    def weight_bytes(self) -> float:
        """Bytes of the packed weight, scales not counted; 4 per element where it stays float."""
        return self.parameters * (self.weight_bits or 32) / 8

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> LayerRow:
        """Inverse of `to_dict`; raises ArtefactError for anything else."""
        return cls(**record(values, _NEEDED, "a layer row", _OPTIONAL))


_BITS, _TEXT, _DECIBEL = (either(NOTHING, kind) for kind in (whole(1, 32), TEXT, NUMBER))
_KINDS: dict[str, Rule] = {
    "layer": TEXT, "role": choice(*map(str, Role)), "block": either(NOTHING, whole(0, 10**6)), "weight_bits": _BITS,
    "activation_bits": _BITS, "parameters": whole(), "macs": whole(), "activation_elements": whole(),
    "weight_sqnr_db": _DECIBEL, "activation_sqnr_db": _DECIBEL, "predicted_loss": NUMBER, "weight_quantizer": _TEXT,
    "activation_quantizer": _TEXT, "execution": TEXT, "pinned": FLAG, "left_bits": _BITS, "left_elements": whole(),
}  # fmt: skip
_NEEDED = {item.name: _KINDS[item.name] for item in fields(LayerRow) if item.default is MISSING}
_OPTIONAL = {item.name: _KINDS[item.name] for item in fields(LayerRow) if item.default is not MISSING}
