"""One row per quantized layer: what it got, what it costs; plain values that a report, a script or JSON can hold."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from fxquant.errors import ArtefactError


@dataclass(frozen=True, slots=True)
class LayerRow:
    """What one layer got.

    layer, role, block: as assigned. weight_bits, activation_bits: None where it has none or stays float. parameters:
    weight elements. macs, activation_elements: per image. weight_sqnr_db, activation_sqnr_db: of the tensors alone, on
    the calibration images. predicted_loss: of the whole model if only this layer were quantized (nats per image under
    the Hessian-guided metric). weight_quantizer, activation_quantizer: kinds of quantizer. execution: "simulated" or
    the integer kernel. pinned: bits fixed by an override or policy. left_bits: of a matmul's left input, where it has
    its own. left_elements: of activation_elements, those of that input.
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
        names = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not isinstance(values, dict) or not needed <= set(values) <= names:
            raise ArtefactError(f"not a layer row: expected the fields {sorted(names)}")
        return cls(**values)
