"""The one call and what stands behind it: a model and a budget in, a quantized model out.

    quantized = fxquant.compile(model, "W4A4", calibration=images)
    print(quantized.report())
    quantized.save("model.fxq")

The call is `Session(model, images).compile("W4A4")`. A session that is kept calibrates and searches once: no budget has
any say in that, so every further budget or allocator starts from what was searched.

    session = fxquant.Session(model, images)
    for budget in ("W8A8", "W4A4"):
        quantized = session.compile(budget)

Accuracy over many budgets, kept in a file after every point: `fxquant.session.sweep`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from allocators.allocator import Allocator
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from allocators.problem.overrides import Bits
from fxquant.artefact.cache import Cache
from fxquant.checks.arguments import json_values
from fxquant.checks.hints import checked
from fxquant.errors import BY_ARGUMENT, BudgetError, OptionError, PipelineError
from fxquant.graph.facts import QUANTIZED
from fxquant.runtime.known_answers import KnownAnswers, range_of
from fxquant.sensitivity.objective import AUTO, Objective
from fxquant.session.compiled import Compiled, load
from fxquant.session.model_source import ModelSource
from fxquant.session.protocol_card import layer_rows, protocol_card
from fxquant.synthesis.synthesize import Synthesis
from passes.allocate.allocate_bits import ALLOCATION, AllocateBits
from passes.allocate.check_budget import check_budget
from passes.allocate.measure_latency import MeasureLatency
from passes.lower.lower import SIMULATED
from passes.pipeline.contract import Journal, PassContext, ProgressReporter, check_images, reporter_of
from passes.pipeline.pipeline import Pipeline
from passes.recipes import recipe as recipe_named
from passes.search.search_cache import run_prefix, split

__all__ = ["Compiled", "Session", "compile", "load"]

_BROUGHT = "budget, allocator, overrides, first_last_bits, fully_quantized, backend and latency"


class Session:
    """A model with its calibration images and a recipe, to be compiled for any number of budgets and allocators.

    Args:
        model: the caller's; it is not modified.
        calibration: see `compile`.
        recipe: a name of `passes.recipes.RECIPES`, or a Pipeline, which brings its own budget and options.
        seed: of every random draw.
        batch_size: images per forward where outputs are compared.
        progress: where long steps report.
        cache: folder that keeps the calibrated and searched model for other processes.
        card: entries to add to the protocol card.
        objective: see `compile`.
        options: of the recipe (overrides, first_last_bits, fully_quantized, ...).

    What `compile` returns equals what `fxquant.compile` returns for the same budget, allocator and options.
    """

    @checked(OptionError, **BY_ARGUMENT)
    def __init__(
        self,
        model: nn.Module,
        calibration: Tensor | Synthesis | None = None,
        *,
        recipe: str | Pipeline = "best",
        seed: int = 0,
        batch_size: int = 8,
        progress: ProgressReporter | None = None,
        cache: str | PathLike[str] | None = None,
        card: Mapping[str, Any] | None = None,
        objective: str | Objective = AUTO,
        **options: Any,
    ) -> None:
        """Check images, recipe and options; nothing runs before `check` or `compile`.

        Raises CalibrationError, ModelError, PipelineError.
        """
        self.model, self.card = model, json_values("card", card or {}, OptionError)
        if isinstance(calibration, Tensor):
            check_images(calibration)
        self._recipe, self._options = recipe, options
        if isinstance(recipe, Pipeline):
            self._check_own(recipe)
        self._example = self.pipeline(None if isinstance(recipe, Pipeline) else "W8A8")  # refuses unknown options
        self._source = ModelSource(model, calibration, seed, batch_size, Cache(cache), reporter_of(progress), objective)

    def _check_own(self, pipeline: Pipeline) -> None:
        """Raise PipelineError for a pipeline of the caller's that leaves nothing quantized, and for options with it."""
        is_plain = all(value is None or value is False or value in ({}, SIMULATED) for value in self._options.values())
        if not is_plain:
            self._refuse_beside_own()
        if QUANTIZED not in pipeline.provides:
            raise PipelineError(
                "the pipeline ends without quantized layers: let it end with SubstituteQuantizers(), or run it "
                "yourself, pipeline.run(fxquant.trace(model, example), PassContext(images))"
            )

    def _refuse_beside_own(self) -> None:
        raise PipelineError(
            f"a Pipeline as recipe brings its own {_BROUGHT}: set them on its passes and give None for the budget, or "
            "name a recipe"
        )

    @property
    def calibration(self) -> Tensor:
        """The calibration images, float (N, C, H, W); synthesised when first asked for where none were given."""
        with torch.inference_mode(False):
            return self._source.images

    @property
    def objective(self) -> Objective:
        """What quantization must keep of the output. Raises as `fxquant.trace` where the model cannot be traced."""
        with torch.inference_mode(False):
            return self._source.objective

    @checked(BudgetError)
    def pipeline(self, budget: Any, allocator: Allocator | None = None) -> Pipeline:
        """The whole pipeline of one point.

        budget: anything `Budget.parse` takes; None where the recipe is a Pipeline.
        """
        if isinstance(self._recipe, Pipeline):
            if budget is not None or allocator is not None:
                self._refuse_beside_own()
            return self._recipe
        return recipe_named(self._recipe)(budget, allocator=allocator, **self._options)

    @torch.inference_mode(False)
    def check(self, budget: Any, allocator: Allocator | None = None) -> None:
        """Refuse a budget that cannot be met, before anything is calibrated. Raises as `fxquant.compile` does."""
        check_budget(self.pipeline(budget, allocator), self._source.with_roles)

    @torch.inference_mode(False)
    def compile(self, budget: Any, allocator: Allocator | None = None, *, last: bool = False) -> Compiled:
        """The model quantized within one budget; calibrates and searches on the first call only.

        Args:
            budget: see `pipeline`.
            allocator: None for the recipe's own.
            last: nothing more will be asked of this session, so that it keeps nothing for later: the one traced model
                becomes the quantized one where no folder keeps it, which halves the memory.

        Raises as `fxquant.compile` does.
        """
        pipeline = self.pipeline(budget, allocator)
        check_budget(pipeline, self._source.with_roles)
        prefix, rest = split(pipeline)
        if last and "_searched" not in self.__dict__:
            context = replace(self._source.context, journal=Journal())
            is_kept = context.cache.folder is not None  # as what differs from the traced model
            traced = self._source.traced if is_kept else self._source.given_up()
            searched = run_prefix(prefix, traced, context, in_place=not is_kept)
            return self._compiled(pipeline, rest.run(searched, context, in_place=True), context.journal)
        searched, context = self._searched, self._after_search()
        return self._compiled(pipeline, rest.run(searched, context), context.journal)

    @torch.inference_mode(False)
    @checked(BudgetError)
    def cost_table(self, budget: Any = "W8A8", lowest: Budget | None = None) -> CostTable:
        """The allocation problem, with overrides and policies applied; calibrates on the first call only.

        budget: of it only which quantities are limited matters: times are measured where it limits the latency. Widths
        that the recipe avoids are left out where the budget `lowest` can be met without them, and by default.
        """
        pipeline = self.pipeline(budget)
        _, rest = split(pipeline)
        found = rest[: rest.position(AllocateBits)].run(self._searched, self._after_search())
        allocate = next(step for step in pipeline if isinstance(step, AllocateBits))
        return allocate.without_narrow(allocate.cost_table(found), lowest)

    @cached_property
    def _searched(self) -> GraphModule:
        """The graph as it is before bits are allocated; no budget has any say in it."""
        prefix, _ = split(self._example)
        return run_prefix(prefix, self._source.traced, self._source.context)

    def _after_search(self) -> PassContext:
        """The context of one point: its journal begins with what led to `_searched`."""
        context = self._source.context
        return replace(context, journal=Journal(list(context.journal.entries)))

    def _compiled(self, pipeline: Pipeline, quantized: GraphModule, journal: Journal) -> Compiled:
        """What a pipeline has made of the traced model, with what it says of itself and its known answers."""
        source, backend = self._source, self._options.get("backend", SIMULATED)
        card = {**protocol_card(self.model, source, pipeline, quantized, backend), **self.card}
        answers = KnownAnswers.measured(quantized, source.model_outputs.answers, range_of(source.images))
        return Compiled(quantized, ALLOCATION.get(quantized), journal, layer_rows(quantized), card, answers)


@checked(OptionError, **BY_ARGUMENT)
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
    objective: str | Objective = AUTO,
) -> Compiled:
    """Quantize a Vision Transformer to mixed bits within a budget. The model is not modified.

    Args:
        model: a Vision Transformer in inference mode; it is not modified.
        budget: what the result may use: "W4A4", 4, "6MB", "W4, 2GBOPs", a dict or a Budget.
        calibration: images, float (N, C, H, W), preprocessed as the model wants them; 32 are usual. None, or a
            Synthesis with options, makes them from the model alone.
        recipe: a name of `passes.recipes.RECIPES`, or a Pipeline, which brings its own budget (give None) and options.
        allocator, overrides, first_last_bits, fully_quantized: see `passes.recipes.assembly.Options`.
        backend: "cpu-native", "cpu-onednn" or "auto" searches only quantizers and widths that this backend runs as
            integers. The result is simulated all the same, and its report says how many layers will run so when it is
            loaded with the backend.
        latency: the batch size and the threads that a budget in ms holds for; None means one image on one thread. It
            needs backend="cpu-native".
        objective: what quantization must keep of the output: "classes" (the distribution over classes), "features"
            (every tensor), "embeddings" (directions of vectors), an Objective of your own, or "auto": classes where the
            model gives class scores, features where it gives anything else.
        seed: seeds every random draw.
        batch_size: how many images a forward takes where outputs are compared. It bounds memory.
        progress: shows how far it is; None: nothing is shown.
        cache: a folder in which all that was calibrated, searched and scored is kept, so that the next budget on the
            same model, images and options only allocates, in any process. None keeps nothing.
        card: entries to add to the protocol card, for example the name of the data.

    Raises CalibrationError, ModelError, TraceError, CoverageError, BudgetError, InfeasibleBudgetError, OverrideError,
    BackendError or PipelineError.
    """
    session = Session(
        model, calibration, recipe=recipe, seed=seed, batch_size=batch_size, progress=progress, cache=cache, card=card,
        overrides=overrides, first_last_bits=first_last_bits, fully_quantized=fully_quantized, backend=backend,
        latency=latency, objective=objective,
    )  # fmt: skip
    return session.compile(budget, allocator, last=True)
