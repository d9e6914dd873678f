"""Calibrate: run the calibration images through the graph and let every observer see its edge, image by image.

Under the Hessian-guided metric each image is also run backward, from random cotangents of the output, which need no
labels (`fxquant.sensitivity.objective`). Only one image's activations are alive at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.checks.finite import is_finite
from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from fxquant.graph.annotation import annotation_of, planned_nodes
from fxquant.graph.facts import Fact, broken_at, missing
from fxquant.graph.nodes import module_of
from fxquant.graph.recorder import Recorder
from fxquant.graph.rows import gradient_rows, has_rows, weight_rows
from fxquant.quantizers.observers import Observer
from fxquant.quantizers.statistics.output_gram import gram_of
from fxquant.sensitivity.logit_gradients import Fisher
from fxquant.sensitivity.objective import Draws, Objective
from passes.pipeline.contract import PassContext
from passes.prepare.folds import FOLDED
from passes.search.input_weights import coherence, heed_massive, input_weight
from passes.search.insert_observers import OBSERVED, observer_nodes, observers_of
from passes.search.owners import owners_among_ranks, settle
from passes.search.views import Views

_NEEDED_BY = "the Hessian-guided metric"


def _observers(graph_module: GraphModule) -> list[tuple[Node, Observer]]:
    """Nodes that call an observer, with it. Raises VerificationError where there is none."""
    modules = dict(graph_module.named_modules())
    found = [(node, modules[str(node.target)]) for node in observer_nodes(graph_module)]
    if not found:
        raise missing("no edge has an observer", "InsertObservers and Calibrate")
    return [(node, module) for node, module in found if isinstance(module, Observer)]


def _check_calibrated(graph_module: GraphModule) -> None:
    """Every observer has seen images."""
    for node, observer in _observers(graph_module):
        if not observer.images and observer.owner is None:
            raise broken_at(node, "this observer has seen no image", "run Calibrate again")


def _check_grams(graph_module: GraphModule) -> None:
    """Wherever a weight is one matrix, the observer of its input has that input's Gram matrix."""
    found = [(node, observer) for node, observer in _observers(graph_module) if observer.keeps_gram]
    if not any(observer.has_gram for _, observer in found):
        raise missing("no observer has a Gram matrix", "Calibrate")
    for node, observer in found:
        linear = [user for user in node.users if _is_linear(graph_module, user)]
        if not observer.has_gram and linear:
            raise broken_at(linear[0], "its input's Gram matrix is not there", "run Calibrate again")


def _is_linear(graph_module: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), nn.Linear)


CALIBRATED = Fact("calibrated", _check_calibrated, rests_on=frozenset({OBSERVED, FOLDED}))
"""Every observer has seen images."""

GRAMS_KNOWN = Fact("Gram matrices known", _check_grams, rests_on=frozenset({OBSERVED, FOLDED}))
"""Observers of weights' inputs have their Gram matrices; `SearchScales(keep_grams=True)` leaves them."""

STATISTICS = frozenset({CALIBRATED, GRAMS_KNOWN})
"""What observers have gathered. A pass that changes weights breaks them: they are of the weights as they were."""


@dataclass(frozen=True)
class Calibrate:
    """Gather statistics in every observer.

    Args:
        gradient: whether the Hessian-guided weights are gathered too, at the price of a backward pass.
        fisher: the cotangent to start from: random "signs"; or, of class scores only, "sampled" (a label drawn from the
            model's output) or "arg-max" (its prediction taken for the label; biased, vanishes for confident models).
        draws: how many backward passes each image gets. Their squared gradients are averaged; the more there are, the
            less the estimate of the Fisher information varies.
        output_error: without gradients, weigh an error by what it does to the layer's output (AdaLog's objective), all
            outputs alike.
        images: how many of the calibration images are used, the first ones; None uses all.
        shrinkage: how far the weights of tokens in Gram matrices are drawn towards the mean of their image, from 0 to
            1. Squared gradients of few images and draws say much of few tokens and next to nothing of the others, so
            what is fitted to them alone is fitted to noise; with 1 all tokens of an image count alike.
        outputs: whether the Gram matrices of gradients at weights' outputs are gathered too, which CompensateWeights
            then reads.
        views: what Gram matrices see beside the images, where these are pictures; None: nothing.
    """

    gradient: bool = True
    fisher: Fisher = "signs"
    draws: int = 4
    output_error: bool = False
    images: int | None = None
    shrinkage: float = 0.0
    outputs: bool = False
    views: Views | None = None

    requires: ClassVar[frozenset[Fact]] = frozenset({OBSERVED})
    provides: ClassVar[frozenset[Fact]] = STATISTICS
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Fill the observers; returns how many.

        Raises CalibrationError for activations that are not finite; where gradients are asked for, also for a model
        whose output is not what the context's objective takes.
        """
        if self.gradient:
            context.objective.check(graph_module, _NEEDED_BY)
        context = replace(context, images_bchw=context.images[: self.images])
        images = len(context.images)
        watched = {node: observers_of(graph_module, node) for node in planned_nodes(graph_module)}
        observers = [observer for found in watched.values() for _, observer in found]
        for observer in observers:
            observer.release()
        grouped = {node: found for node, found in watched.items() if any(o.asks_for_channels for _, o in found)}
        if grouped:
            self._measure_channels(graph_module, context, grouped)
        with_gram = {node for node, found in watched.items() if any(o.keeps_gram for _, o in found)}
        of_images, of_views = Recorder(graph_module, set(watched)), Recorder(graph_module, with_gram)
        gathered = _Statistics(observers)
        owners = owners_among_ranks(graph_module, list(watched))
        of_observers = owners and [owner for owner, found in zip(owners, watched.values(), strict=True) for _ in found]
        views = self.views or Views(0)
        rounds = 1 + (views.of_each(images) if context.pictures else 0)
        for seen, batch in context.gather(
            "calibrating", gathered, graph_module, repr(self), in_place=True, owners=of_observers, rounds=rounds
        ):
            is_view = seen >= images
            shown = views.view(context.images, seen - images, context.seed).to(batch) if is_view else batch.clone()
            recorder = of_views if is_view else of_images
            draws = Draws(views.draws if is_view else self.draws, context.seed, seen, self.fisher)
            with torch.set_grad_enabled(self.gradient):
                output = recorder.run(shown.requires_grad_(self.gradient))
                with _naming_views(is_view):
                    squares, grams = self._gradients(graph_module, output, recorder, context.objective, draws)
            if self.output_error and not self.gradient:
                squares = {node: torch.ones_like(tensor) for node, tensor in recorder.differentiated.items()}
            del output
            with torch.no_grad():
                for node in list(recorder.inputs):
                    inputs, squared = recorder.inputs.pop(node), squares.pop(node, None)
                    with _naming_views(is_view):
                        _check_finite(node, [inputs[index] for index, _ in watched[node]])
                    if not is_view:
                        _update(graph_module, node, watched[node], inputs, squared)
                    _update_grams(graph_module, node, watched[node], inputs, squared, self.shrinkage, 1 / rounds)
                    if node in grams:
                        watched[node][0][1].add_output_gram(grams.pop(node))
            recorder.forget()
        if of_observers is not None:
            settle(observers, of_observers)
        context.note(views=(rounds - 1) * images)
        return len(observers)

    def _measure_channels(
        self, graph_module: GraphModule, context: PassContext, grouped: dict[Node, list[tuple[int, Observer]]]
    ) -> None:
        recorder = Recorder(graph_module, set(grouped))
        gathered = _Statistics([observer for found in grouped.values() for _, observer in found])
        with torch.no_grad():
            for _, batch in context.gather("finding outlier channels", gathered, graph_module, repr(self)):
                recorder.run(batch)
                for node, found in grouped.items():
                    for index, observer in found:
                        observer.measure_channels(recorder.inputs[node][index])
                recorder.forget()
        for found in grouped.values():
            for _, observer in found:
                observer.settle_channels()

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if self.draws < 1 or (self.images is not None and self.images < 1):
            raise CalibrationError(f"draws must be at least 1, and images at least 1 or None; found {self}")
        if not 0 <= self.shrinkage <= 1:
            raise CalibrationError(f"shrinkage must be from 0 to 1; found {self}")

    def _gradients(
        self, graph_module: GraphModule, output: Any, recorder: Recorder, objective: Objective, draws: Draws
    ) -> tuple[dict[Node, Tensor], dict[Node, Tensor]]:
        """Of the gradient that each watched node's metric needs, the mean square over draws; and of those at weights'
        outputs the mean Gram matrices, where they are asked for. Both empty where no gradient is.
        """
        if not self.gradient:
            return {}, {}
        outputs = objective.outputs(output, _NEEDED_BY)
        nodes = list(recorder.differentiated)
        tensors = [recorder.differentiated[node] for node in nodes]
        squares: dict[Node, Tensor] = {}
        grams: dict[Node, Tensor] = {}
        for found in objective.gradients(outputs, tensors, draws):
            for node, gradient in zip(nodes, found, strict=True):
                if gradient is not None and node in squares:
                    squares[node].addcmul_(gradient, gradient)
                elif gradient is not None:
                    squares[node] = gradient.square()
                module = module_of(graph_module, node) if self.outputs else None
                if gradient is not None and module is not None and has_rows(module):
                    gram = gram_of(gradient_rows(module, gradient)).div_(draws.count)
                    grams[node] = gram.add_(grams[node]) if node in grams else gram
            del found  # before the next draw's
        means = {
            node: squares[node].div_(draws.count) if node in squares else torch.zeros_like(tensor)
            for node, tensor in zip(nodes, tensors, strict=True)
        }
        return means, grams


@dataclass(frozen=True)
class _Statistics:
    """What observers have gathered, for `PassContext.gather`: sums to which a batch adds one number each."""

    observers: list[Observer]

    def state(self) -> dict[str, Tensor]:
        """All observers', by their place in the list."""
        return {f"{i}/{name}": t for i, o in enumerate(self.observers) for name, t in o.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        found = self._by_observer(state)
        for place, observer in enumerate(self.observers):
            observer.restore(found[place])

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what was gathered of further images."""
        for place, own in self._by_observer(state).items():
            self.observers[place].merge(own)

    def _by_observer(self, state: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            place, _, rest = name.partition("/")
            found.setdefault(int(place), {})[rest] = tensor
        return found


@contextmanager
def _naming_views(is_view: bool) -> Iterator[None]:
    """Say of an error inside that it is about a view, where it is."""
    try:
        yield
    except CalibrationError as error:
        if not is_view:
            raise
        raise CalibrationError(
            f"{error}. This was a view, an image made from calibration images by crops, other colours and mixtures: "
            'where these are no pictures, leave views out, best(budget, views=0), "--option views=0"'
        ) from error


def _check_finite(node: Node, inputs: list[Tensor]) -> None:
    """Raise CalibrationError where a node's inputs have NaN or infinite values."""
    if not all(is_finite(tensor) for tensor in inputs):
        raise CalibrationError(
            f"the input of {annotation_of(node).layer} has NaN or infinite values on a calibration batch: check the "
            "model's weights, and how the images were preprocessed"
        )


def _update(
    graph_module: GraphModule,
    node: Node,
    found: list[tuple[int, Observer]],
    inputs: tuple[Tensor, ...],
    squared: Tensor | None,
) -> None:
    """Let a node's observers see its inputs of one image.

    Args:
        graph_module: the graph.
        node: what reads the inputs.
        found: its observers, each with the index of the input it sees.
        inputs: float, on all arguments of the node.
        squared: of the gradient that the node's metric needs.
    """
    module = module_of(graph_module, node)
    for index, observer in found:
        weight = None if squared is None else input_weight(module, inputs, index, squared)
        observer.update(inputs[index], None if weight is None else heed_massive(inputs[index], weight))
        if module is None and index == 0 and observer.asks_for_coherence:
            observer.update_coherence(coherence(inputs[1]))


def _update_grams(
    graph_module: GraphModule,
    node: Node,
    found: list[tuple[int, Observer]],
    inputs: tuple[Tensor, ...],
    squared: Tensor | None,
    shrinkage: float,
    share: float,
) -> None:
    """Add a node's inputs of one image or view to the Gram matrices of its observers.

    Args:
        graph_module, node, found, inputs, squared: see `_update`.
        shrinkage: see Calibrate.
        share: how much the image counts.
    """
    module = module_of(graph_module, node)
    for index, observer in found:
        rows = weight_rows(module, inputs[index]) if observer.keeps_gram and module is not None else None
        if module is not None and rows is not None:
            gradients = None if squared is None else gradient_rows(module, squared)
            observer.update_gram(rows, gradients, shrinkage, share)
