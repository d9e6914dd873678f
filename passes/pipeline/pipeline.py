"""A pipeline: an immutable sequence of passes, checked when it is built, run on a copy.

    pipeline = mptq_vit("W4A4").without(FoldSqb)
    graph_module = pipeline.run(trace(model, example), PassContext(images))

What a pass is: `passes.pipeline.contract`; pipelines that are ready: `passes.recipes`.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor
from torch.fx import GraphModule

from fxquant.checks.arguments import whole
from fxquant.checks.hints import checked, fitted
from fxquant.checks.torch_modes import usual
from fxquant.errors import CalibrationError, PipelineError
from fxquant.graph.facts import QUANTIZED, TRACED, Fact, declare, facts_of, known_after, verify
from fxquant.graph.nodes import image_of
from passes.pipeline.contract import Dependent, Pass, PassContext, check_images
from passes.pipeline.freed_memory import give_back
from passes.pipeline.journal import peak_mib
from passes.pipeline.proof import Proof


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `assumes`: facts of the graph it will be given.

    Raises PipelineError when a pass requires a fact that nothing before it provides.
    """

    passes: tuple[Pass, ...]
    assumes: frozenset[Fact] = frozenset({TRACED})

    @checked(PipelineError)
    def __init__(self, passes: Iterable[Pass], assumes: Iterable[Fact] = (TRACED,)) -> None:
        """Raise PipelineError for a pass in the wrong place, and for what is no pass."""
        object.__setattr__(self, "passes", tuple(passes))
        for step in self.passes:
            if isinstance(step, type) or not isinstance(step, Pass):
                wanted = f"write {step.__name__}()" if isinstance(step, type) else "see passes.pipeline.contract"
                raise PipelineError.for_type(f"{step!r} is no pass: {wanted}")
        steps = [step.among(self.passes) if isinstance(step, Dependent) else step for step in self.passes]
        object.__setattr__(self, "passes", tuple(steps))
        facts = [fitted("assumes", fact, Fact, PipelineError) for fact in assumes]
        object.__setattr__(self, "assumes", frozenset(facts))
        known = self.assumes
        for index, step in enumerate(self.passes):
            missing = step.requires - known
            if missing:
                raise PipelineError(
                    f"pass {index} {step!r} requires {_listed(missing)}, which no earlier pass provides; "
                    f"known there: {_listed(known) or 'nothing'}"
                )
            known = known_after(known, step.provides, step.breaks)

    @property
    def provides(self) -> frozenset[Fact]:
        """Facts that hold after the last pass."""
        known = self.assumes
        for step in self.passes:
            known = known_after(known, step.provides, step.breaks)
        return known

    def __iter__(self) -> Iterator[Pass]:
        """The passes in order."""
        return iter(self.passes)

    def __len__(self) -> int:
        """How many passes."""
        return len(self.passes)

    @overload
    def __getitem__(self, index: int) -> Pass: ...

    @overload
    def __getitem__(self, index: slice) -> Pipeline: ...

    def __getitem__(self, index: int | slice) -> Pass | Pipeline:
        """One pass; or a slice of them, which assumes what the passes before it provide."""
        if not isinstance(index, slice):
            position = whole("the index of a pass", index, PipelineError, least=-len(self), most=len(self) - 1)
            return self.passes[position]
        start, _, _ = index.indices(len(self.passes))
        before = Pipeline(self.passes[:start], self.assumes)
        return Pipeline(self.passes[index], before.provides)

    def position(self, kind: type) -> int:
        """Index of the first pass of this kind; raises PipelineError when there is none."""
        if not isinstance(kind, type):
            raise PipelineError.for_type(f"a pass is named by its class, {type(kind).__name__}, not by {kind!r}")
        for index, step in enumerate(self.passes):
            if isinstance(step, kind):
                return index
        raise PipelineError(f"no {kind.__name__} in this pipeline: {[type(step).__name__ for step in self.passes]}")

    def before(self, kind: type, *new: Pass) -> Pipeline:
        """With passes inserted before the first of this kind."""
        index = self.position(kind)
        return Pipeline((*self.passes[:index], *new, *self.passes[index:]), self.assumes)

    def after(self, kind: type, *new: Pass) -> Pipeline:
        """With passes inserted after the first of this kind."""
        index = self.position(kind) + 1
        return Pipeline((*self.passes[:index], *new, *self.passes[index:]), self.assumes)

    def replace(self, kind: type, new: Pass) -> Pipeline:
        """With the first pass of this kind replaced."""
        index = self.position(kind)
        return Pipeline((*self.passes[:index], new, *self.passes[index + 1 :]), self.assumes)

    def changed(self, kind: type, **options: Any) -> Pipeline:
        """With other options for the first pass of this kind, `pipeline.changed(Distil, steps=600)`.

        Raises PipelineError when there is none, or it has no such option.
        """
        step: Any = self.passes[self.position(kind)]
        fields = dataclasses.fields(step) if dataclasses.is_dataclass(step) else ()
        known = [field.name for field in fields if field.init]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise PipelineError(f"{kind.__name__} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
        return self.replace(kind, dataclasses.replace(step, **options))

    def without(self, kind: type) -> Pipeline:
        """Without any pass of this kind; raises PipelineError when there is none."""
        self.position(kind)
        return Pipeline((step for step in self.passes if not isinstance(step, kind)), self.assumes)

    @usual()
    @checked(PipelineError)
    def run(
        self,
        graph_module: GraphModule,
        context: PassContext,
        passed: Callable[[GraphModule], None] | None = None,
        *,
        in_place: bool = False,
    ) -> GraphModule:
        """Run all passes on a copy, verify the graph around each, write the journal; returns the copy.

        Args:
            graph_module: with the facts that this pipeline assumes.
            context: images, seed, cache and journal for the passes.
            passed: called after every pass with the graph, which it must not change.
            in_place: no copy is made, for a graph that nobody else will use; saves a model's memory.

        Raises PipelineError when the graph lacks a fact this pipeline assumes, CalibrationError for images that are not
        the graph's or not finite, VerificationError when a pass did not establish what it provides, or is given a graph
        that has not what it requires, or when a pass changed what the graph computes (`passes.pipeline.proof`),
        BackendError when a lowering did.
        """
        missing = self.assumes - facts_of(graph_module)
        if missing:
            raise PipelineError(
                f"the graph given lacks {_listed(missing)}: make it with fxquant.trace, or run the passes "
                f"that provide them first"
            )
        _check_images(graph_module, context.images_bchw)
        given = None if in_place else graph_module
        graph_module = graph_module if in_place else copy.deepcopy(graph_module)
        proof = Proof(given, graph_module, context)
        del given  # the proof lets go of it, unless it is what will be lowered
        task = context.progress.track("passes", len(self.passes))
        for index, step in enumerate(self.passes):
            start = time.perf_counter()
            for fact in sorted(step.requires, key=str):
                verify(graph_module, fact)
            proof.before(graph_module, step)
            changed = step.apply(graph_module, context)
            declare(graph_module, step.provides, step.breaks)
            for fact in sorted(step.provides, key=str):
                verify(graph_module, fact)
            proof.after(graph_module, step, context)
            # What `compile` runs in two parts is proven in the second, where it goes on.
            is_part = context.expected is not None and QUANTIZED not in facts_of(graph_module)
            if index + 1 == len(self.passes) and not is_part:
                proof.finish(graph_module, context)
            context.journal.close_step(repr(step), changed, time.perf_counter() - start, peak_mib())
            if passed is not None:
                passed(graph_module)
            give_back(graph_module)
            task.advance()
        task.close()
        return graph_module


def _check_images(graph_module: GraphModule, images_bchw: Tensor | None) -> None:
    if images_bchw is None:
        return
    traced = image_of(graph_module).meta["tensor_meta"]
    if images_bchw.shape[1:] != traced.shape[1:]:
        raise CalibrationError(
            f"images of the context have shape {tuple(images_bchw.shape)}, and the graph takes "
            f"{tuple(traced.shape[1:])} for each: resize them or trace again"
        )
    check_images(images_bchw, minimum=0)
    if images_bchw.dtype != traced.dtype:
        raise CalibrationError(
            f"images of the context are {images_bchw.dtype}, and the graph takes {traced.dtype}: prepare them as the "
            f"model wants them, then images.to({traced.dtype})"
        )


def _listed(facts: Iterable[Fact]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(map(str, facts)))
