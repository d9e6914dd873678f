"""A report small enough to check by hand: two blocks, a matmul without a weight, a patch embedding and a head."""

from __future__ import annotations

from typing import Any

from allocators.allocation import Allocation
from allocators.problem.budget import Budget
from fxquant.report.tables import Report
from fxquant.runtime.layer_row import LayerRow, OperandRow
from passes.pipeline.journal import Journal, JournalEntry


def row(
    layer: str, role: str, block: int | None, w: int | None, a: int | None, parameters: int, loss: float, **other: Any
) -> LayerRow:
    """A row whose input has 100 elements, a product's two 50 each."""
    pinned, count = other.pop("pinned", False), 2 if role in ("qk", "av") else 1
    weight = [OperandRow("weight", parameters, w, None if w is None else 20.0, w and "uniform", pinned)]
    inputs = [OperandRow("other", 100 // count, a, 18.5, "uniform", pinned)] * count
    operands = (*(weight if count == 1 else []), *inputs)
    values: dict[str, Any] = {"macs": 1_000_000, "execution": "simulated", **other}
    return LayerRow(layer=layer, role=role, block=block, operands=operands, predicted_loss=loss, **values)


ROWS = [
    row("patch_embed.proj", "patch_embed", None, 8, 8, 1000, 0.1, pinned=True),
    row("blocks.0.attn.qkv", "qkv", 0, 4, 5, 3000, 0.2),
    row("blocks.0.attn.qk", "qk", 0, None, 5, 0, 0.3),
    row("blocks.0.mlp.fc1", "fc1", 0, 3, 4, 4000, 0.4),
    row("blocks.1.attn.qkv", "qkv", 1, 4, 4, 3000, 0.0),
    row("head", "head", None, 8, 8, 1000, 0.0),
]

ALLOCATION = Allocation(
    weight_bits={r.layer: r.weight_bits for r in ROWS if r.weight_bits},
    activation_bits={r.layer: r.activation_bits for r in ROWS if r.activation_bits and r.role != "patch_embed"},
    objective=1.0,
    usage={"mean_weight_bits": 4.333, "mean_activation_bits": 5.2, "weight_bytes": 6500.0, "bit_operations": 2.13e8},
    budget=Budget.parse("W4.5A5.5"),
    status="optimal",
    gap=0.001,
    binding=("mean_weight_bits",),
    solver="milp",
    seconds=0.5,
)

CARD: dict[str, Any] = {
    "model": "Tiny", "parameters": 12_500, "recipe": "mptq_vit", "pipeline": ["AssignRoles()", "FoldSqb(eps='sq-b')"],
    "calibration_images": 8, "seed": 3, "stays_float": ["gelu"], "execution": "simulated",
    "first_last_weight_bits": {"patch_embed": [8], "head": [8]}, "versions": {"torch": "2"},
}  # fmt: skip

JOURNAL = Journal([JournalEntry("AssignRoles()", 6, 0.014, 100.4), JournalEntry("FoldSqb(eps='sq-b')", 2, 1.5, 120.0)])


def report() -> Report:
    return Report(ROWS, ALLOCATION, JOURNAL, CARD)
