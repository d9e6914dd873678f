"""Proof that passes keep what the model computes: two images go through the graph, and its output may not move.

The graph is run with every quantizer bypassed. After each pass that declares `Effect.EXACT` its output must be what it
was before; at the end of a pipeline, with the float tensors restored that passes of `Effect.WEIGHTS` have replaced, it
must be what the caller's own model gives (`PassContext.expected`), hooks, buffers and patched forwards included. So
whatever any pass drops on the way is found, also by one that declares nothing.

    |found - expected|  <=  RELATIVE (max expected - min expected) + ABSOLUTE max |expected|

A run leaves behind some values of every node, so that an error can name the first node that moved, and no
activations are kept. Folds do move nodes, and a later node moves back: the last that agrees is named too.

A pass that lowers proves itself, by a method `prove` that compares with the simulated graph (`Proving`).
"""

from __future__ import annotations

import copy
import time
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.checks.finite import is_finite
from fxquant.errors import CalibrationError, VerificationError
from fxquant.graph.facts import LOWERED, QUANTIZED, facts_of
from fxquant.graph.nodes import device_of
from fxquant.graph.notes import SIZES
from fxquant.graph.output_tree import leaves
from fxquant.graph.printer import describe
from fxquant.runtime.known_answers import answer_images_for
from passes.pipeline.contract import Effect, Pass, PassContext, SizedModel, effect_of
from passes.pipeline.float_run import (
    ABSOLUTE,
    RELATIVE,
    Run,
    Tensors,
    difference,
    float_tensors,
    furthest,
    run_in_float,
    tolerance,
)

IMAGES = 2
_MODEL = "the model it was made from"


@runtime_checkable
class Proving(Protocol):
    """A pass that lowers and can say whether it did so rightly."""

    def prove(self, simulated: GraphModule, lowered: GraphModule, context: PassContext) -> tuple[float, float] | None:
        """How far the lowered graph is from the simulated one, and how far it may be; None: they are the same.

        Args:
            simulated: the graph before it was lowered.
            lowered: the same graph, lowered.
            context: what the pass was given.

        Raises BackendError where it is further.
        """


class Proof:
    """Watches the passes of one pipeline run."""

    def __init__(self, given: GraphModule | None, graph_module: GraphModule, context: PassContext) -> None:
        """Begin to watch.

        Args:
            given: what the pipeline was given, if no pass changes it.
            graph_module: the graph that passes change.
            context: with the outputs of the caller's model, where they are known.
        """
        self._given = given
        self._simulated: GraphModule | None = None
        self._is_float = LOWERED not in facts_of(graph_module)
        self._expected = context.expected
        self._whose = _MODEL
        self._given_images = context.images_bchw
        self._run: Run | None = None  # the last that was right
        self._is_proven = False  # whether the graph is still the one of that run
        self._restored: Tensors | None = None  # float tensors from before a pass replaced them
        self._unproven: list[str] = []
        self._cpu_s = 0.0

    def before(self, graph_module: GraphModule, step: Pass) -> None:
        """Prove that the graph is still right where the step is about to be judged by it. Raises VerificationError."""
        effect = effect_of(step)
        given, self._given = self._given, None
        if LOWERED in step.provides:
            self.finish(graph_module)
            self._simulated = given or copy.deepcopy(graph_module)
            self._is_float = False
        if not self._is_float:
            return
        if effect in (Effect.EXACT, Effect.FUNCTION) and self._restored is not None:
            # Tensors from before a pass replaced them do not fit what this step makes of the graph.
            self.finish(graph_module)
            self._anchor(f"what it computed before {step!r}")
        if effect is Effect.EXACT and not self._is_proven:
            self._prove(graph_module, f"before {step!r} the graph")
        if effect is Effect.FUNCTION:
            self.finish(graph_module)
        if self._restored is None and (effect is Effect.WEIGHTS or QUANTIZED in step.provides):
            self.finish(graph_module)
            self._restored = float_tensors(graph_module, copied=effect is Effect.WEIGHTS)

    def after(self, graph_module: GraphModule, step: Pass, context: PassContext) -> None:
        """Prove an exact step; of another, remember that it has run. Raises VerificationError, naming the step.

        Args:
            graph_module: the graph as the step left it.
            step: the pass that has run.
            context: what the pass was given.
        """
        effect = effect_of(step)
        self._unproven.append(repr(step))
        if self._simulated is not None and isinstance(step, Proving):
            self._prove_lowering(self._simulated, graph_module, step, context)
        elif effect is Effect.EXACT and self._is_float:
            what = f"{step!r} declares Effect.EXACT, and changed what the graph computes: it"
            self._prove(graph_module, what, context)
        elif effect is Effect.FUNCTION:
            self._anchor(f"what it computed after {step!r}")
        else:
            self._is_proven = False

    def _prove_lowering(
        self, simulated: GraphModule, graph_module: GraphModule, step: Proving, context: PassContext
    ) -> None:
        self._simulated = None
        started = time.process_time()
        proven = step.prove(simulated, graph_module, context)
        if proven is None:
            return
        found, allowed = proven
        cpu_ms = round(1e3 * (time.process_time() - started), 1)
        context.note(proof={"difference": found, "tolerance": allowed, "cpu_ms": cpu_ms})

    def _anchor(self, whose: str) -> None:
        """From here on the graph is held against itself as it is now."""
        self._expected = self._run = self._restored = None
        self._is_proven, self._whose, self._unproven = False, whose, []

    def finish(self, graph_module: GraphModule, context: PassContext | None = None) -> None:
        """Prove the whole, where there is something to hold it against and it has changed. Raises VerificationError."""
        if self._is_float and self._expected is not None and not self._is_proven:
            self._prove(graph_module, "the graph, its quantizers bypassed and its float weights restored,", context)
        graphs = SIZES.get(graph_module)
        if context is not None and graphs is not None:
            for sized in context.sized:
                if sized.size not in graphs:
                    height, width = sized.size
                    raise VerificationError(f"there is no graph for images of {height} x {width}: run AddSizes last")
                self._prove_size(graph_module, graphs[sized.size], sized)

    def _prove_size(self, graph_module: GraphModule, other: GraphModule, sized: SizedModel) -> None:
        """Hold the graph of another image size against the model at that size."""
        height, width = sized.size
        remedy = "leave the size out of image_sizes, and compile for it by itself"
        if self._whose != _MODEL:
            raise VerificationError(
                f"images of {height} x {width} cannot be proven right, since a pass changes what the graph computes "
                f"(Effect.FUNCTION): {remedy}"
            )
        names = {str(node.target): node.name for node in graph_module.graph.nodes if node.op == "call_module"}
        restored = {
            node.name: (self._restored or {}).get(names.get(str(node.target), ""), {})
            for node in other.graph.nodes
            if node.op == "call_module"
        }
        run = run_in_float(other, sized.images_bchw, restored)
        found, allowed = furthest(run.output, sized.expected)
        if not found <= allowed:
            raise VerificationError(
                f"the graph for images of {height} x {width}, its quantizers bypassed, does not compute what the model "
                f"does at that size: outputs on two images differ by {found:.3g}, and {allowed:.3g} is allowed; "
                f"{remedy}"
            )

    def _prove(self, graph_module: GraphModule, what: str, context: PassContext | None = None) -> None:
        started = time.process_time()
        run = run_in_float(graph_module, _images(graph_module, self._given_images), self._restored or {})
        expected = run.output if self._expected is None else self._expected
        if not all(is_finite(tensor) for tensor in leaves(expected)):
            raise CalibrationError(
                "the model's output on the first calibration images is not finite: check its weights, and "
                "how the images were preprocessed"
            )
        found, allowed = furthest(run.output, expected)
        self._cpu_s += time.process_time() - started
        if not found <= allowed:
            raise VerificationError(
                f"{what} does not compute {self._whose}: outputs on two images differ by {found:.3g}, and "
                f"{allowed:.3g} is allowed ({RELATIVE:g} of their range and {ABSOLUTE:g} of the largest); "
                f"{_where(graph_module, self._run, run)}; {_float32_remedy(device_of(graph_module))}{self._remedy()}"
            )
        self._expected, self._run, self._is_proven, self._unproven = expected, run, True, []
        if context is not None:
            context.note(proof={"difference": found, "tolerance": allowed, "cpu_ms": round(1e3 * self._cpu_s, 1)})
            self._cpu_s = 0.0

    def _remedy(self) -> str:
        first = "tracing missed something of the model, or " if self._run is None and self._expected is not None else ""
        listed = f"one of these passes did it: {', '.join(self._unproven)}" if self._unproven else "no pass has run yet"
        return (
            f"{first}{listed}; repair it or leave it out, pipeline.without(...), or let it declare its effect, "
            f"Effect.WEIGHTS or Effect.FUNCTION, if it is meant to change this (docs/how_to/writing_a_pass.md)"
        )


def _float32_remedy(device: torch.device) -> str:
    """What to try first where torch rounds convolutions more coarsely than float32; else nothing."""
    if device.type != "cuda" or not torch.backends.cudnn.allow_tf32:
        return ""
    return "torch rounds convolutions to TF32 there, set torch.backends.cudnn.allow_tf32 = False; if that is not it, "


def _images(graph_module: GraphModule, given: Tensor | None) -> Tensor:
    """Two of the images given, one twice where there is one, else made from a seed; they are where the graph is."""
    if given is None or not len(given):
        return answer_images_for(graph_module).to(device_of(graph_module))
    return given[torch.arange(IMAGES) % len(given)].to(device_of(graph_module))


def _agrees(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and difference(found, expected) <= tolerance(expected)


def _where(graph_module: GraphModule, before: Run | None, after: Run) -> str:
    """The first node that moved, and the last that agrees, among those that were there before."""
    if before is None:
        return "there is no earlier run to compare node by node"
    names = [node for node in graph_module.graph.nodes if node.name in before.samples and node.name in after.samples]
    agree = [_agrees(after.samples[node.name], before.samples[node.name]) for node in names]
    if all(agree):
        return "every node that was there before still has its value"
    first, last = names[agree.index(False)], [node for node, same in zip(names, agree, strict=True) if same][-1:]
    found = f"the first node whose value moved is `{describe(first)}`"
    return found + "".join(f", the last that has kept its value is `{describe(node)}`" for node in last)
