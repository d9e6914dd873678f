"""The one call: a model and a budget in, a quantized model out.

    quantized = fxquant.compile(model, "W4A4", calibration=images)
    print(quantized.report())
    quantized.save("model.fxq")

Many budgets from one calibration: `fxquant.session.sweep`.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from allocators.allocator import Allocator
from allocators.problem.overrides import Bits
from fxquant.artefact.cache import Cache
from fxquant.checks.arguments import json_values
from fxquant.checks.hints import checked
from fxquant.errors import BY_ARGUMENT, OptionError, PipelineError
from fxquant.graph.facts import QUANTIZED
from fxquant.runtime.known_answers import KnownAnswers, range_of
from fxquant.session.compiled import Compiled, load
from fxquant.session.model_source import CalibrationSource
from fxquant.session.protocol_card import layer_rows, protocol_card
from fxquant.synthesis.synthesize import Synthesis
from passes.allocate.allocate_bits import ALLOCATION
from passes.allocate.check_budget import check_budget
from passes.allocate.measure_latency import MeasureLatency
from passes.lower.lower import SIMULATED
from passes.pipeline.contract import Journal, ProgressReporter, check_images, reporter_of
from passes.pipeline.pipeline import Pipeline
from passes.recipes import recipe as recipe_named
from passes.search.search_cache import run_prefix, split

__all__ = ["Compiled", "compile", "load"]


@checked(OptionError, **BY_ARGUMENT)
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
    entries = json_values("card", card or {}, OptionError)
    if isinstance(calibration, Tensor):
        check_images(calibration)
    if isinstance(recipe, Pipeline):
        is_plain = allocator is None and not overrides and first_last_bits is None and not fully_quantized
        if budget is not None or not is_plain or backend != SIMULATED or latency is not None:
            raise PipelineError(
                "a Pipeline as recipe brings its own budget, allocator, overrides, first_last_bits, fully_quantized, "
                "backend and latency: set them on its passes and give None for the budget, or name a recipe"
            )
        if QUANTIZED not in recipe.provides:
            raise PipelineError(
                "the pipeline ends without quantized layers: let it end with SubstituteQuantizers(), or run it "
                "yourself, pipeline.run(fxquant.trace(model, example), PassContext(images))"
            )
        pipeline = recipe
    else:
        options: dict[str, Any] = {"overrides": overrides, "first_last_bits": first_last_bits, "backend": backend}
        options |= {} if latency is None else {"latency": latency}
        pipeline = recipe_named(recipe)(budget, allocator=allocator, fully_quantized=fully_quantized, **options)
    source = CalibrationSource(model, calibration, seed, batch_size, Cache(cache), reporter_of(progress))
    prefix, rest = split(pipeline)
    check_budget(pipeline, source.with_roles)
    context = source.context
    is_kept = context.cache.folder is not None  # as what differs from the traced model
    traced = source.traced if is_kept else source.given_up()
    quantized = rest.run(run_prefix(prefix, traced, context, in_place=not is_kept), context, in_place=True)
    return compiled_from(model, source, pipeline, quantized, context.journal, backend=backend, card=entries)


def compiled_from(
    model: nn.Module,
    source: CalibrationSource,
    pipeline: Pipeline,
    quantized: GraphModule,
    journal: Journal,
    *,
    backend: str = SIMULATED,
    card: Mapping[str, Any] | None = None,
) -> Compiled:
    """What a pipeline has made, with what it says of itself and its known answers.

    Args:
        model: the caller's.
        source: the model as it was traced, and its images.
        pipeline: what was run, from the traced model on.
        quantized: what came out of it.
        journal: of all its passes.
        backend: what quantizers and widths were restricted to.
        card: entries that are added to the protocol card, or replace its own.
    """
    protocol = protocol_card(model, source, pipeline, quantized, backend)
    answers = KnownAnswers.measured(quantized, source.model_outputs.answers, range_of(source.images))
    layers = layer_rows(quantized)
    return Compiled(quantized, ALLOCATION.get(quantized), journal, layers, {**protocol, **(card or {})}, answers)
