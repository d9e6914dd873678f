"""ScoreLayers: write on every layer how much the model is expected to suffer from it at each candidate width.

AllocateBits then minimises these scores; a layer without any keeps the predicted losses of SearchScales. What a score
is, a `Metric` decides (`passes.allocate.metrics`). Scores are kept in the context's cache under all they depend on, so
that another budget solves again without scoring again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from torch.fx import GraphModule, Node

from fxquant.checks.arguments import shown
from fxquant.checks.hints import check_fields
from fxquant.errors import SensitivityError
from fxquant.graph.annotation import Annotation, Candidate, Role, annotate, annotation_of, nodes_with_role
from fxquant.graph.facts import ROLES_ASSIGNED, Fact, broken_at, missing
from passes.pipeline.contract import PassContext
from passes.search.insert_observers import OBSERVED, observers_of
from passes.search.search_scales import SCALES_SEARCHED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED

LAMPQ_ROLES = (Role.QKV, Role.PROJ, Role.FC1, Role.FC2)
"""The four linear layers of a block that LampQ and VT-PTQ allocate."""


@dataclass(frozen=True)
class Scores:
    """What a metric found, JSON values only.

    weight, activation: one score per candidate width, by layer; the two of a layer add up. notes: for the journal.
    """

    weight: dict[str, list[float]]
    activation: dict[str, list[float]]
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def shared(cls, layers: dict[str, list[float]], notes: dict[str, Any]) -> Scores:
        """Scores of whole layers, half for the weights and half for the inputs.

        Where both get the same width the sum is the layer's score; where they do not, each counts alike.
        """
        halves = {layer: [score / 2 for score in scores] for layer, scores in layers.items()}
        return cls(halves, {layer: list(scores) for layer, scores in halves.items()}, notes)


class Metric(Protocol):
    """A frozen dataclass whose fields are its options; its repr is part of the scores' signature."""

    def score(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> Scores:
        """Scores of these nodes, which have candidates and observers, in graph order; it may leave some out.

        Reads the graph and its annotations, changes nothing. Raises SensitivityError where it cannot score.
        """


def _check_scores(graph_module: GraphModule) -> None:
    """Some layer has scores, and every layer that has some has one per candidate."""
    annotated = [(node, annotation_of(node)) for node in nodes_with_role(graph_module)]
    if not any(found.weight_sensitivity or found.activation_sensitivity for _, found in annotated):
        raise missing("no layer has scores", "ScoreLayers")
    for node, annotation in annotated:
        groups = [(annotation.weight_sensitivity, annotation.weight_candidates)]
        groups += [(annotation.activation_sensitivity, group) for group in annotation.activation_candidates]
        for scores, candidates in groups:
            if scores and len(scores) != len(candidates):
                problem = f"it has {len(scores)} scores for {len(candidates)} candidates"
                raise broken_at(node, problem, "run ScoreLayers after SearchScales")


SCORED = Fact("scored", _check_scores, rests_on=frozenset({SCALES_SEARCHED}))
"""Layers have one score per candidate, which AllocateBits minimises."""


@dataclass(frozen=True)
class ScoreLayers:
    """Score layers by a metric.

    roles: of the layers scored; None means all that the metric can score. Layers left out keep their predicted losses,
    in the unit of the scale search (nats under the Hessian-guided metric): under a metric with another unit, pin them
    (`AllocateBits.role_bits`).
    """

    metric: Metric
    roles: tuple[Role, ...] | None = LAMPQ_ROLES

    requires: ClassVar[frozenset[Fact]] = frozenset({ROLES_ASSIGNED, OBSERVED, SCALES_SEARCHED})
    provides: ClassVar[frozenset[Fact]] = frozenset({SCORED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({BITS_ALLOCATED})

    def __post_init__(self) -> None:
        """Raise SensitivityError for options that do not fit."""
        check_fields(self, SensitivityError)

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Annotate scores, clear those of other layers; returns the number of layers scored. Notes the metric's notes.

        Raises SensitivityError for a score that is negative or not finite, and where all are equal.
        """
        observed = [node for node in nodes_with_role(graph_module) if observers_of(graph_module, node)]
        nodes = [node for node in observed if self.roles is None or annotation_of(node).role in self.roles]
        candidates = [[annotation_of(node).layer, *described_candidates(annotation_of(node))] for node in observed]
        key = context.signature(graph_module, "scores", repr(self), candidates)
        scores = Scores(**context.cache.recall(key, lambda: asdict(self._scores(graph_module, nodes, context))))
        for node in observed:
            layer = annotation_of(node).layer
            weight, activation = scores.weight.get(layer, []), scores.activation.get(layer, [])
            if not all(0 <= score < float("inf") for score in (*weight, *activation)):
                raise SensitivityError(f"{self.metric!r} gives {layer} the scores {weight} and {activation}")
            annotate(
                node,
                weight_sensitivity=tuple(weight) if annotation_of(node).weight_candidates else (),
                activation_sensitivity=tuple(activation) if annotation_of(node).activation_candidates else (),
            )
        every = [score for found in (scores.weight, scores.activation) for values in found.values() for score in values]
        if len(every) > 1 and min(every) == max(every):
            raise SensitivityError(
                f"{self.metric!r} gives every layer and width the score {every[0]:g}: it says nothing of any layer; "
                f"choose another metric, or leave ScoreLayers out, and the predicted losses of SearchScales count"
            )
        scored = scores.weight.keys() | scores.activation.keys()
        context.note(scored=len(scored), **scores.notes)
        return len(scored)

    def _scores(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> Scores:
        found = self.metric.score(graph_module, nodes, context)
        if not isinstance(found, Scores):
            raise SensitivityError.for_type(f"{self.metric!r} returned {shown(found)}, not Scores")
        return found


def described_candidates(annotation: Annotation) -> list[Any]:
    """JSON values that tell a node's candidates from others, for signatures: what scores and updates depend on."""

    def each(candidates: tuple[Candidate, ...]) -> list[Any]:
        return [[c.bits, c.loss, c.noise, c.quantizer.kind] for c in candidates]

    return [each(annotation.weight_candidates), *(each(group) for group in annotation.activation_candidates)]
