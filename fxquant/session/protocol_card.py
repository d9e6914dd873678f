"""What a compiled model says of itself: one row per layer, and the card that tells how the numbers came about."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxquant import ranks
from fxquant.checks.arguments import json_values
from fxquant.errors import ArtefactError, OptionError
from fxquant.graph.annotation import Candidate, Operand, Role, annotation_of, nodes_with_role
from fxquant.graph.notes import COVERAGE, EXPORTED
from fxquant.report.tables import check_card
from fxquant.runtime.layer_row import LayerRow, OperandRow
from fxquant.runtime.mac_shares import mac_shares
from fxquant.session.compiled import IMAGE_ARGUMENT
from fxquant.session.model_source import ModelSource
from passes.allocate.measure_latency import MeasureLatency
from passes.lower.lower import SIMULATED, backend_summary
from passes.pipeline.contract import Pass
from passes.pipeline.pipeline import Pipeline
from passes.substitute.substitute_quantizers import chosen

_OF_THE_CALL = frozenset({
    "parameters", "calibration_images", "image_shape", IMAGE_ARGUMENT, "image_sizes", "labels_used", "seed",
    "distributed", "objective", "pipeline", "stays_float", "first_last_weight_bits", "execution", "backend", "latency",
    "captured_by", "multiply_accumulates", "coverage", "versions", "layers",
})  # fmt: skip
"""Entries of a card that are found out, and that nobody else can know."""


def checked_entries(given: Any) -> dict[str, Any]:
    """A caller's own entries for the card, JSON values by name; what the model and its images are called may be theirs.

    Raises OptionError for anything else, for an entry that only the call can know, and for one that no report can show.
    """
    card = json_values("card", given, OptionError)
    if known := sorted(_OF_THE_CALL & card.keys()):
        raise OptionError(f"the card's '{known[0]}' is what the compile finds out: give your entry another name")
    try:
        check_card(card)
    except ArtefactError as error:
        raise OptionError(f"{error}: give your entry another name") from error
    return card


def layer_rows(graph_module: GraphModule) -> list[LayerRow]:
    """One row per node that has bits, in graph order."""
    rows = []
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        if not annotation.has_bits:
            continue
        found = [chosen(operand, annotation.layer) for operand in annotation.operands]
        rows.append(
            LayerRow(
                layer=annotation.layer,
                role=str(annotation.role),
                block=annotation.block,
                macs=annotation.macs,
                operands=tuple(map(_operand_row, annotation.operands, found)),
                predicted_loss=sum(candidate.loss for candidate in found if candidate is not None),
                execution=SIMULATED,
            )
        )
    return rows


def _operand_row(operand: Operand, found: Candidate | None) -> OperandRow:
    row = OperandRow(str(operand.source), operand.elements, operand.bits, pinned=operand.pinned)
    if found is None:
        return row
    return replace(row, sqnr_db=-10 * math.log10(max(found.noise_ratio, 1e-30)), quantizer=found.quantizer.kind)


def _uses_labels(step: Pass) -> bool:
    """Whether a pass, or the metric that it scores by, was given labels."""
    return any(getattr(each, "labels", ()) for each in (step, getattr(step, "metric", None)))


def protocol_card(
    model: nn.Module,
    source: ModelSource,
    pipeline: Pipeline,
    graph_module: GraphModule,
    backend: str = SIMULATED,
) -> dict[str, Any]:
    """How the numbers came about, as JSON values.

    Args:
        model: the caller's model.
        source: where calibration images came from.
        pipeline: the pipeline that was run.
        graph_module: the graph that came out of it.
        backend: what quantizers and widths were restricted to.
    """
    annotations = [annotation_of(node) for node in nodes_with_role(graph_module)]
    quantized = {annotation.role for annotation in annotations if any(annotation.input_bits)}
    float_parts = [str(role) for role in (Role.SOFTMAX, Role.GELU, Role.LAYER_NORM) if role not in quantized]
    bits_by_role = {
        str(role): sorted({a.weight_bits or 32 for a in annotations if a.role is role})
        for role in (Role.PATCH_EMBED, Role.HEAD)
    }
    timed = next((step for step in pipeline if isinstance(step, MeasureLatency)), None)
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "calibration": source.described,
        "calibration_images": len(source.images),
        "image_shape": list(source.images.shape[1:]),
        **({} if source.argument is None else {IMAGE_ARGUMENT: source.argument}),
        **({"image_sizes": [list(sized.size) for sized in source.sized]} if source.sized else {}),
        "labels_used": any(_uses_labels(step) for step in pipeline),
        "seed": source.context.seed,
        **ranks.card(),
        "objective": source.context.objective.described,
        "pipeline": [repr(step) for step in pipeline],
        "stays_float": [*float_parts, "residual additions"],
        "first_last_weight_bits": bits_by_role,
        "execution": SIMULATED,
        **({} if backend == SIMULATED else {"backend": backend_summary(graph_module, backend)}),
        **({} if timed is None else {"latency": timed.described}),
        **({} if EXPORTED.get(graph_module) is None else {"captured_by": "torch.export"}),
        "multiply_accumulates": mac_shares(graph_module),
        "coverage": math.nan if (coverage := COVERAGE.get(graph_module)) is None else coverage,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "mip")},
    }
