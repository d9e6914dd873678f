"""The one call and what stands behind it: a model and a budget in, a quantized model out.

    quantized = fxquant.compile(model, "W4A4", calibration=images)
    print(quantized.report())
    quantized.save("model.fxq")

The call is `Session(model, images).compile("W4A4")`. A session that is kept calibrates and searches once: no budget has
any say in that, so every further budget or allocator starts from what was searched.

    session = fxquant.Session(model, images)
    for budget in ("W8A8", "W4A4"):
        quantized = session.compile(budget)

Accuracy over many budgets, kept in a file after every point: `fxquant.session.sweep`. In a process group of
torch.distributed every rank makes the same calls, and they share the work out: `fxquant.ranks`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Unpack

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from allocators.allocator import Allocator
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from fxquant import ranks
from fxquant.artefact.cache import Cache
from fxquant.checks.arguments import shown
from fxquant.checks.hints import checked
from fxquant.checks.torch_modes import exact
from fxquant.errors import BY_ARGUMENT, BudgetError, OptionError, PipelineError
from fxquant.graph.capture.exported import module_of_program
from fxquant.graph.facts import LOWERED, QUANTIZED
from fxquant.graph.notes import SIZES
from fxquant.report.progress import bars_for, quiet
from fxquant.runtime.known_answers import KnownAnswers, range_of
from fxquant.sensitivity.objective import Objective
from fxquant.session.calibration_images import gathered
from fxquant.session.compiled import Compiled, load, lowered_by
from fxquant.session.model_source import ModelSource
from fxquant.session.options import DEFAULT_BATCH_SIZE, DEFAULT_OBJECTIVE, DEFAULT_RECIPE, DEFAULT_SEED, SessionOptions
from fxquant.session.protocol_card import checked_entries, layer_rows, protocol_card
from fxquant.session.sizes import checked_sizes
from fxquant.synthesis.pictures import Synthesis
from passes.allocate.allocate_bits import ALLOCATION, AllocateBits
from passes.allocate.check_budget import check_budget
from passes.lower.lower import SIMULATED
from passes.options import SharedOptions, documented
from passes.pipeline.contract import PassContext, check_images
from passes.pipeline.journal import Journal
from passes.pipeline.pipeline import Pipeline
from passes.pipeline.progress import reporter_of
from passes.recipes import recipe as recipe_named
from passes.search.search_cache import run_prefix, split
from passes.substitute.add_sizes import AddSizes

__all__ = ["Compiled", "Session", "compile", "load"]

_BROUGHT = f"budget, allocator, {', '.join(SharedOptions.__annotations__)}"


class Session:
    """A model with its calibration images and a recipe, to be compiled for any number of budgets and allocators.

    What `compile` returns equals what `fxquant.compile` returns for the same budget, allocator and options.
    """

    @checked(OptionError, **BY_ARGUMENT)
    @documented(SessionOptions)
    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        calibration: Tensor | Iterable[Any] | Synthesis | None = None,
        **options: Unpack[SessionOptions],
    ) -> None:
        """Check images, recipe and options; nothing runs before `check` or `compile`.

        Args:
            model: the caller's; it is not modified, and compiled on the device that it is on. Also what `torch.export`
                made of one, with a batch of any size.
            calibration: images, float (N, C, H, W), preprocessed as the model wants them, on any device; 32 are usual.
                Also a list, DataLoader or other iterable of images or (images, labels), which is gone through once and
                may give 1,024 images and 1 GiB. None, or a Synthesis with options, makes them from the model alone.
        {options}

        Raises CalibrationError, ModelError, OptionError, PipelineError.
        """
        self._sizes = checked_sizes(options.get("image_sizes") or ())
        if isinstance(model, ExportedProgram):
            if self._sizes:
                raise OptionError(
                    "an ExportedProgram takes images of one size: leave out image_sizes, or give the nn.Module that "
                    "was exported"
                )
            model = module_of_program(model)
        self.model, self.card = model, checked_entries(options.get("card") or {})
        if calibration is not None and not isinstance(calibration, Synthesis):
            calibration = gathered(calibration)
            check_images(calibration)
        self._recipe = options.get("recipe", DEFAULT_RECIPE)
        self._options = {name: value for name, value in options.items() if name in SharedOptions.__annotations__}
        if isinstance(self._recipe, Pipeline):
            self._check_own(self._recipe)
        self.pipeline(None if isinstance(self._recipe, Pipeline) else "W8A8")  # refuses options that do not fit
        self._searched: dict[tuple[str, ...], tuple[GraphModule, Journal]] = {}
        progress = options.get("progress")
        bars = bars_for(progress)
        self._bars: AbstractContextManager[Any] = nullcontext() if bars is None else bars
        self._source = ModelSource(
            model,
            calibration,
            options.get("seed", DEFAULT_SEED),
            options.get("batch_size", DEFAULT_BATCH_SIZE),
            Cache(options.get("cache")),
            reporter_of(bars or quiet(progress)),
            options.get("objective", DEFAULT_OBJECTIVE),
            options.get("inputs"),
            self._sizes,
        )

    def _check_own(self, pipeline: Pipeline) -> None:
        """Raise PipelineError for a pipeline of the caller's that leaves nothing quantized, and for options with it."""
        is_plain = all(value is None or value is False or value in ({}, SIMULATED) for value in self._options.values())
        if not is_plain:
            self._refuse_beside_own()
        if self._sizes and LOWERED in pipeline.provides:
            raise PipelineError(
                "a lowered graph takes one image size: let the pipeline end before Lower, or leave out image_sizes"
            )
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
        with exact(), self._bars:
            return self._source.images

    def float_model(self) -> nn.Module:
        """A copy of the model in inference mode, called with images alone: what quantized ones are held against."""
        with exact():
            return self._source.float_model()

    @property
    def objective(self) -> Objective:
        """What quantization must keep of the output. Raises as `fxquant.trace` where the model cannot be traced."""
        with exact():
            return self._source.objective

    @checked(BudgetError)
    def pipeline(self, budget: Any, allocator: Allocator | None = None) -> Pipeline:
        """The whole pipeline of one point.

        budget: anything `Budget.parse` takes; None where the recipe is a Pipeline.
        """
        if isinstance(self._recipe, Pipeline):
            if budget is not None or allocator is not None:
                self._refuse_beside_own()
            return self._with_sizes(self._recipe)
        recipe = recipe_named(self._recipe) if isinstance(self._recipe, str) else self._recipe
        if isinstance(recipe, type):
            raise PipelineError.for_type(
                f"the recipe is the class {recipe.__name__}: give a name, a function or a Pipeline"
            )
        found = recipe(budget, allocator=allocator, **self._options)
        if not isinstance(found, Pipeline):
            raise PipelineError.for_type(f"the recipe {recipe!r} returned {shown(found)}, not a Pipeline")
        return self._with_sizes(found)

    def _with_sizes(self, pipeline: Pipeline) -> Pipeline:
        return Pipeline((*pipeline, AddSizes()), pipeline.assumes) if self._sizes else pipeline

    @exact()
    def check(self, budget: Any, allocator: Allocator | None = None) -> None:
        """Refuse a budget that cannot be met, before anything is calibrated. Raises as `fxquant.compile` does."""
        check_budget(self.pipeline(budget, allocator), self._source.with_roles)

    @exact()
    def compile(self, budget: Any, allocator: Allocator | None = None, *, last: bool = False) -> Compiled:
        """The model quantized within one budget; calibrates and searches on the first call only.

        Args:
            budget: what the bits may use at most; see `pipeline`.
            allocator: what chooses the bits; None takes the recipe's own.
            last: nothing more will be asked of this session, so that it keeps nothing for later: the one traced model
                becomes the quantized one where no folder keeps it, which halves the memory.

        Raises as `fxquant.compile` does.
        """
        pipeline = self.pipeline(budget, allocator)
        with self._bars, self._ranks(pipeline):
            return self._compile(pipeline, last)

    def _ranks(self, pipeline: Pipeline) -> AbstractContextManager[None]:
        """Inside, ranks of a process group share the work out. Raises DistributedError; see `fxquant.ranks`."""
        # Values without a text of their own are shown with their address, which says nothing.
        steps = [re.sub(r" at 0x[0-9a-f]+", "", repr(step)) for step in pipeline]
        passes = {f"pass {place} of the pipeline": step for place, step in enumerate(steps)}
        return ranks.together(lambda: {**self._source.given, "number of passes": len(steps), **passes})

    def _compile(self, pipeline: Pipeline, last: bool) -> Compiled:
        check_budget(pipeline, self._source.with_roles)
        # The report, the known answers and the file are of the simulated graph, which a lowering is held against.
        lowers = [LOWERED in step.provides for step in pipeline]
        end = lowers.index(True) if True in lowers else len(pipeline)
        prefix, rest = split(pipeline[:end])
        if last and not self._searched:
            context = replace(self._source.context, journal=Journal())
            is_kept = context.cache.folder is not None  # as what differs from the traced model
            traced = self._source.traced if is_kept else self._source.given_up()
            searched = run_prefix(prefix, traced, context, in_place=not is_kept)
            found = self._compiled(pipeline, rest.run(searched, context, in_place=True), context.journal)
        else:
            searched, context = self._after_search(prefix)
            found = self._compiled(pipeline, rest.run(searched, context), context.journal)
        return found if end == len(pipeline) else lowered_by(pipeline[end:], found, context)

    @exact()
    @checked(BudgetError)
    def cost_table(self, budget: Any = "W8A8", lowest: Budget | None = None) -> CostTable:
        """The allocation problem, with overrides and policies applied; calibrates on the first call only.

        budget: of it only which quantities are limited matters: times are measured where it limits the latency. Widths
        that the recipe avoids are left out where the budget `lowest` can be met without them, and by default.
        """
        pipeline = self.pipeline(budget)
        prefix, rest = split(pipeline)
        with self._bars, self._ranks(pipeline):
            searched, context = self._after_search(prefix)
            found = rest[: rest.position(AllocateBits)].run(searched, context)
        allocate = next(step for step in pipeline if isinstance(step, AllocateBits))
        return allocate.without_narrow(allocate.cost_table(found), lowest)

    @exact()
    def searched(self) -> GraphModule:
        """The graph with quantizers found at every width and none chosen; calibrates on the first call only.

        It is this session's own: read it, and do not change it. Raises as `fxquant.compile` does.
        """
        prefix, _ = split(self.pipeline(None if isinstance(self._recipe, Pipeline) else "W8A8"))
        with self._bars, self._ranks(prefix):
            return self._after_search(prefix)[0]

    @contextmanager
    def step(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a step of `total` units where this session shows its own; gives what says that so many more are done."""
        with self._bars:
            task = self._source.progress.track(label, total)
            yield task.advance
            task.close()

    def _after_search(self, prefix: Pipeline) -> tuple[GraphModule, PassContext]:
        """The graph after the passes before bits are allocated, and a context whose journal tells of them.

        No budget has a say in these passes of our recipes; where one has, in a recipe of the caller's, they run for it.
        """
        key = tuple(map(repr, prefix))
        if key not in self._searched:
            context = replace(self._source.context, journal=Journal())
            self._searched[key] = run_prefix(prefix, self._source.traced, context), context.journal
        searched, journal = self._searched[key]
        return searched, replace(self._source.context, journal=Journal(list(journal.entries)))

    def _compiled(self, pipeline: Pipeline, quantized: GraphModule, journal: Journal) -> Compiled:
        """What a pipeline has made of the traced model, with what it says of itself and its known answers."""
        source, backend = self._source, str(self._options.get("backend", SIMULATED))
        card = {**protocol_card(self.model, source, pipeline, quantized, backend), **self.card}
        outputs = source.model_outputs
        answers = KnownAnswers.measured(quantized, outputs.answers, range_of(source.images))
        allocation, rows = ALLOCATION.get(quantized), layer_rows(quantized)
        sizes = quantized.meta.pop(SIZES.key, {})
        return Compiled(quantized, allocation, journal, rows, card, answers, outputs.tree, sizes)


@checked(OptionError, **BY_ARGUMENT)
@documented(SessionOptions)
def compile(
    model: nn.Module | ExportedProgram,
    budget: Any,
    *,
    calibration: Tensor | Iterable[Any] | Synthesis | None = None,
    allocator: Allocator | None = None,
    **options: Unpack[SessionOptions],
) -> Compiled:
    """Quantize a Vision Transformer to mixed bits within a budget. The model is not modified.

    Args:
        model: the caller's model, which is not changed, and compiled on the device that it is on; or what
            `torch.export` made of one, with a batch of any size.
        budget: "W4A4", 4, "6MB", "W4, 2GBOPs", a dict or a Budget; None where the recipe is a Pipeline.
        calibration: images, float (N, C, H, W), preprocessed as the model wants them, on any device; 32 are usual. Also
            a list, DataLoader or other iterable of images or (images, labels), which is gone through once and may give
            1,024 images and 1 GiB. None, or a Synthesis with options, makes them from the model alone.
        allocator: what chooses bits; None for the recipe's own.
        {options}

    Raises CalibrationError, ModelError, TraceError, CoverageError, BudgetError, InfeasibleBudgetError, OverrideError,
    BackendError, OptionError or PipelineError.
    """
    return Session(model, calibration, **options).compile(budget, allocator, last=True)
