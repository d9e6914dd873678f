"""The one call: a model and a budget in, a quantized model out.

    quantized = fxquant.compile(model, "W4A4", calibration=images)
    print(quantized.report())
    quantized.save("model.fxq")

Many budgets from one calibration: `fxquant.sweep`.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

import networkx
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from allocators.allocation import Allocation
from allocators.allocator import Allocator
from allocators.overrides import Bits
from fxquant.cache import Cache
from fxquant.errors import ArtefactError, PipelineError
from fxquant.export.onnx_file import to_onnx
from fxquant.graph import pattern
from fxquant.graph.annotation import Fact, Role, annotation_of, nodes_with_role
from fxquant.report.picture import write_picture
from fxquant.report.tables import Report
from fxquant.runtime import artefact
from fxquant.runtime.container import write_file
from fxquant.runtime.layer_row import LayerRow
from fxquant.synthesis.source import CalibrationSource
from fxquant.synthesis.synthesize import Synthesis
from passes.allocate_bits import allocation_of
from passes.contract import Journal, JournalEntry, PassContext, ProgressReporter, SilentProgress, check_images
from passes.lower import SIMULATED, Lower, backend_summary, execution_of, execution_summary
from passes.measure_latency import MeasureLatency
from passes.pipeline import Pipeline
from passes.prefix import check_budget, run_prefix, split
from passes.recipes import recipe as recipe_named
from passes.substitute_quantizers import chosen


class Compiled(nn.Module):
    """A quantized model: call it like the original.

    graph_module: the annotated graph that runs. allocation: bits by layer and how they were found. journal: one entry
    per pass. layers: one row per quantized layer. card: the protocol (data, policies, what stays float, versions).
    """

    def __init__(
        self,
        graph_module: GraphModule,
        allocation: Allocation | None,
        journal: Journal,
        layers: list[LayerRow],
        card: dict[str, Any],
    ) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.allocation, self.journal, self.layers, self.card = allocation, journal, layers, card
        self.eval()

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Float (B, C, H, W) images to what the original model returns for them."""
        result: Tensor = self.graph_module(images_bchw)
        return result

    def report(self) -> Report:
        """Tables per layer and in total; print it, or take `.to_dict()`."""
        return Report(self.layers, self.allocation, self.journal, self.card)

    def to_networkx(self) -> networkx.DiGraph:
        """The annotated graph, one networkx node per graph node."""
        return pattern.to_networkx(self.graph_module)

    def draw(self, path: str | PathLike[str]) -> None:
        """Draw the bits: blocks by roles as `.svg`, the graph as Graphviz `.dot`. Raises ArtefactError."""
        write_picture(path, self.graph_module, title=str(self.card.get("model", "")))

    def lowered(self, backend: str = "auto") -> Compiled:
        """This model with integer kernels, weights packed in memory; this one stays as it is.

        backend: see `passes.lower.Lower`. Outputs equal this model's within float rounding; `.report()` lists the
        kernel of each layer. Raises BackendError where the backend cannot run here, MissingExtraError without its
        extra.
        """
        pipeline = Pipeline([Lower(backend)], assumes=[Fact.QUANTIZED])
        journal = Journal(list(self.journal.entries))
        graph_module = pipeline.run(self.graph_module, PassContext(journal=journal))
        kernels = execution_of(graph_module)
        layers = [replace(row, execution=kernels.get(row.layer, row.execution)) for row in self.layers]
        card = {**self.card, "execution": execution_summary(kernels)}
        return Compiled(graph_module, self.allocation, journal, layers, card)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the artefact: one file, packed weights, no code. Raises ArtefactError, also for a lowered model."""
        if execution_of(self.graph_module):
            raise ArtefactError(
                "a lowered model belongs to the machine it was lowered on: save the model it was lowered from, and "
                "lower again where it is loaded, fxquant.load(path, backend='auto')"
            )
        card = {**self.card, "layers": [row.to_dict() for row in self.layers]}
        journal = [asdict(entry) for entry in self.journal.entries]
        allocation = None if self.allocation is None else self.allocation.to_json()
        artefact.save(path, self.graph_module, card=card, allocation_json=allocation, journal=journal)

    def export_onnx(self, path: str | PathLike[str], *, weight_type: str = "int8") -> dict[str, str]:
        """Write an ONNX model (opset 21) with QuantizeLinear and DequantizeLinear, for other runtimes.

        Input "images", float32 (B, C, H, W) with any B, output "scores"; the card is in its metadata. weight_type:
        "int8", or "int4" for INT4 where a weight has at most 4 bits. Returns, by layer, "int8" or "simulated" (float
        operators); what runs as int8 is up to the runtime.

        Raises MissingExtraError without onnx and onnxscript; ExportError for a lowered model, an unknown weight_type
        and operations that torch cannot export; ArtefactError where the file cannot be written.
        """
        found = to_onnx(self.graph_module, weight_type=weight_type, card=self.card)
        write_file(Path(path), found.content)
        return found.layers


def load(path: str | PathLike[str], backend: str = "simulated") -> Compiled:
    """Read an artefact written by `Compiled.save`; outputs equal the saved model's bit for bit.

    backend: "simulated", or how to run it as integers, see `Compiled.lowered`: "auto", "cpu-native", "cpu-onednn",
    "cuda", "openvino". Runs nothing the file says. Raises ArtefactError for a file that is damaged, foreign or of
    another version, BackendError where the backend cannot run here, MissingExtraError without its extra.
    """
    found = artefact.load(path)
    card = dict(found.card)
    rows = card.pop("layers", None)
    if not isinstance(rows, list):
        raise ArtefactError(f"{path} has no list of layers in its card")
    try:
        entries = [JournalEntry(**entry) for entry in found.journal]
    except TypeError as error:
        raise ArtefactError(f"the journal of {path} does not fit: {error}") from error
    allocation = None if found.allocation_json is None else Allocation.from_json(found.allocation_json)
    layers = [LayerRow.from_dict(row) for row in rows]
    compiled = Compiled(found.graph_module, allocation, Journal(entries), layers, card)
    return compiled if backend == SIMULATED else compiled.lowered(backend)


@torch.inference_mode(False)
def compile(
    model: nn.Module,
    budget: Any,
    *,
    calibration: Tensor | Synthesis | None = None,
    recipe: str | Pipeline = "best",
    allocator: Allocator | None = None,
    overrides: Mapping[str, Bits] | None = None,
    first_last_bits: int | None = None,
    fully_quantized: bool = False,
    backend: str = SIMULATED,
    latency: MeasureLatency | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: ProgressReporter | None = None,
    cache: str | PathLike[str] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Compiled:
    """Quantize a Vision Transformer to mixed bits within a budget. The model is not modified.

    budget: "W4A4", 4, "6MB", "W4, 2GBOPs", a dict or a Budget. calibration: images, float (N, C, H, W), preprocessed as
    the model wants them; 32 are usual. None, or a Synthesis with options, makes them from the model alone. recipe: a
    name of `passes.recipes.RECIPES`, or a Pipeline, which brings its own budget (give None) and options. allocator,
    overrides, first_last_bits, fully_quantized: see `passes.recipes.assembly.Options`. backend: "cpu-native",
    "cpu-onednn" or "auto" chooses among quantizers and widths that it runs as integers; the result is simulated, loads
    with a backend and says in its report how many layers will run so. latency: for which batch size and threads a
    budget in ms holds, one image on one thread if not given; it needs backend="cpu-native". seed: of every random draw.
    batch_size: images per forward where outputs are compared, bounds memory. cache: folder in which what was
    calibrated, searched and scored is kept, so that the next budget on the same model, images and options only
    allocates, in any process; None keeps nothing. card: entries to add to the protocol card, for example the name of
    the data.

    Raises CalibrationError, ModelError, TraceError, CoverageError, BudgetError, InfeasibleBudgetError, OverrideError,
    BackendError or PipelineError.
    """
    if calibration is not None and not isinstance(calibration, Synthesis):
        check_images(calibration)
    if isinstance(recipe, Pipeline):
        is_plain = allocator is None and not overrides and first_last_bits is None and not fully_quantized
        if budget is not None or not is_plain or backend != SIMULATED or latency is not None:
            raise PipelineError(
                "a Pipeline as recipe brings its own budget, allocator, overrides, first_last_bits, fully_quantized, "
                "backend and latency: set them on its passes and give None for the budget, or name a recipe"
            )
        if Fact.QUANTIZED not in recipe.provides:
            raise PipelineError(
                "the pipeline ends without quantized layers: let it end with SubstituteQuantizers(), or run it "
                "yourself, pipeline.run(fxquant.trace(model, example), PassContext(images))"
            )
        pipeline = recipe
    else:
        options: dict[str, Any] = {"overrides": overrides, "first_last_bits": first_last_bits, "backend": backend}
        options |= {} if latency is None else {"latency": latency}
        pipeline = recipe_named(recipe)(budget, allocator=allocator, fully_quantized=fully_quantized, **options)
    source = CalibrationSource(model, calibration, seed, batch_size, Cache(cache), progress or SilentProgress())
    prefix, rest = split(pipeline)
    check_budget(pipeline, source.with_roles)
    context = source.context
    quantized = rest.run(run_prefix(prefix, source.traced, context), context, in_place=True)
    protocol = protocol_card(model, source, pipeline, quantized, backend)
    return Compiled(
        quantized, allocation_of(quantized), context.journal, layer_rows(quantized), {**protocol, **(card or {})}
    )


def layer_rows(graph_module: GraphModule) -> list[LayerRow]:
    """One row per node that has bits, in graph order."""
    rows = []
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        if annotation.weight_bits is None and annotation.activation_bits is None:
            continue
        weight = chosen(annotation.weight_candidates, annotation.weight_bits)
        found = [chosen(*pair) for pair in zip(annotation.activation_candidates, annotation.input_bits, strict=True)]
        inputs = [candidate for candidate in found if candidate is not None]
        ratio = sum(c.noise / max(c.signal, 1e-30) for c in inputs) / max(len(inputs), 1)
        rows.append(
            LayerRow(
                layer=annotation.layer,
                role=str(annotation.role),
                block=annotation.block,
                weight_bits=annotation.weight_bits,
                activation_bits=annotation.activation_bits,
                parameters=annotation.parameters,
                macs=annotation.macs,
                activation_elements=annotation.activation_elements,
                left_bits=annotation.left_bits,
                left_elements=annotation.left_elements,
                weight_sqnr_db=None if weight is None else _decibel(weight.noise / max(weight.signal, 1e-30)),
                activation_sqnr_db=_decibel(ratio) if inputs else None,
                predicted_loss=sum(c.loss for c in (*inputs, *([weight] if weight else []))),
                weight_quantizer=None if weight is None else weight.quantizer.kind,
                activation_quantizer=" x ".join(dict.fromkeys(c.quantizer.kind for c in inputs)) or None,
                execution="simulated",
                pinned=annotation.pinned,
            )
        )
    return rows


def _decibel(ratio: float) -> float:
    return -10 * math.log10(max(ratio, 1e-30))


def protocol_card(
    model: nn.Module,
    source: CalibrationSource,
    pipeline: Pipeline,
    graph_module: GraphModule,
    backend: str = SIMULATED,
) -> dict[str, Any]:
    """How the numbers came about, as JSON values. backend: what quantizers and widths were restricted to."""
    quantized = {annotation_of(n).role for n in nodes_with_role(graph_module) if annotation_of(n).activation_bits}
    float_parts = [str(role) for role in (Role.SOFTMAX, Role.GELU, Role.LAYER_NORM) if role not in quantized]
    bits_by_role = {
        str(role): sorted({annotation_of(n).weight_bits or 32 for n in nodes_with_role(graph_module, role)})
        for role in (Role.PATCH_EMBED, Role.HEAD)
    }
    timed = next((step for step in pipeline if isinstance(step, MeasureLatency)), None)
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "calibration": source.described,
        "calibration_images": len(source.images),
        "image_shape": list(source.images.shape[1:]),
        "labels_used": any(getattr(getattr(step, "metric", None), "labels", ()) for step in pipeline),
        "seed": source.context.seed,
        "pipeline": [repr(step) for step in pipeline],
        "stays_float": [*float_parts, "residual additions"],
        "first_last_weight_bits": bits_by_role,
        "execution": "simulated",
        **({} if backend == SIMULATED else {"backend": backend_summary(graph_module, backend)}),
        **({} if timed is None else {"latency": timed.described}),
        "coverage": float(graph_module.meta.get("coverage", math.nan)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "mip")},
    }
