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
from fxquant.graph.annotation import Annotation, Role, annotate_operands, annotation_of, nodes_with_role, planned_nodes
from fxquant.graph.facts import Fact, broken_at, missing
from passes.pipeline.contract import PassContext
from passes.search.search_scales import SCALES_SEARCHED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED

LAMPQ_ROLES = (Role.QKV, Role.PROJ, Role.FC1, Role.FC2)
"""The four linear layers of a block that LampQ and VT-PTQ allocate."""


@dataclass(frozen=True)
class Scores:
    """What a metric found, JSON values only.

    layers: by layer, for each of its operands one score per candidate width; scores of operands add up. An operand may
    have none, []. notes: for the journal.
    """

    layers: dict[str, list[list[float]]]
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def shared(cls, layers: dict[str, list[float]], notes: dict[str, Any]) -> Scores:
        """Scores of whole layers of two operands, half for each.

        Where both get the same width the sum is the layer's score; where they do not, each counts alike.
        """
        return cls({layer: halves(scores) for layer, scores in layers.items()}, notes)


def halves(scores: Sequence[float]) -> list[list[float]]:
    """The scores of two operands together, half for each."""
    return [[score / 2 for score in scores] for _ in range(2)]


class Metric(Protocol):
    """A frozen dataclass whose fields are its options; its repr is part of the scores' signature."""

    def score(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> Scores:
        """Scores of these nodes, whose operands have candidates, in graph order; it may leave some out.

        Reads the graph and its annotations, changes nothing. Raises SensitivityError where it cannot score.

        Args:
            graph_module: with candidates on the nodes; it is only read.
            nodes: the nodes to score, in graph order.
            context: with the calibration images and the seed; a metric may leave notes in the journal.
        """


def _check_scores(graph_module: GraphModule) -> None:
    """Some layer has scores, and every layer that has some has one per candidate."""
    operands = [(node, o) for node in nodes_with_role(graph_module) for o in annotation_of(node).operands]
    if not any(operand.scores for _, operand in operands):
        raise missing("no layer has scores", "ScoreLayers")
    for node, operand in operands:
        if operand.scores and len(operand.scores) != len(operand.candidates):
            problem = f"it has {len(operand.scores)} scores for {len(operand.candidates)} candidates"
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

    requires: ClassVar[frozenset[Fact]] = frozenset({SCALES_SEARCHED})
    provides: ClassVar[frozenset[Fact]] = frozenset({SCORED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({BITS_ALLOCATED})

    def __post_init__(self) -> None:
        """Raise SensitivityError for options that do not fit."""
        check_fields(self, SensitivityError)

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Annotate scores, clear those of other layers; returns the number of layers scored. Notes the metric's notes.

        Raises SensitivityError for a score that is negative or not finite, and where all are equal.
        """
        planned = planned_nodes(graph_module)
        nodes = [node for node in planned if self.roles is None or annotation_of(node).role in self.roles]
        candidates = [[annotation_of(node).layer, *described_candidates(annotation_of(node))] for node in planned]
        key = context.signature(graph_module, "scores", repr(self), candidates)
        scores = Scores(**context.cache.recall(key, lambda: asdict(self._scores(graph_module, nodes, context))))
        for node in planned:
            annotation = annotation_of(node)
            found = scores.layers.get(annotation.layer, [[]] * len(annotation.operands))
            if not all(0 <= score < float("inf") for values in found for score in values):
                raise SensitivityError(f"{self.metric!r} gives the operands of {annotation.layer} the scores {found}")
            pairs = zip(annotation.operands, found, strict=False)
            kept = [tuple(values) if operand.candidates else () for operand, values in pairs]
            annotate_operands(node, scores=kept)
        every = [score for found in scores.layers.values() for values in found for score in values]
        if len(every) > 1 and min(every) == max(every):
            raise SensitivityError(
                f"{self.metric!r} gives every layer and width the score {every[0]:g}: it says nothing of any layer; "
                f"choose another metric, or leave ScoreLayers out, and the predicted losses of SearchScales count"
            )
        context.note(scored=len(scores.layers), **scores.notes)
        return len(scores.layers)

    def _scores(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> Scores:
        found = self.metric.score(graph_module, nodes, context)
        if not isinstance(found, Scores):
            raise SensitivityError.for_type(f"{self.metric!r} returned {shown(found)}, not Scores")
        return found


def described_candidates(annotation: Annotation) -> list[Any]:
    """JSON values that tell a node's candidates from others, for signatures: what scores and updates depend on."""
    return [
        [operand.tied, *([c.bits, c.loss, c.noise, c.quantizer.kind] for c in operand.candidates)]
        for operand in annotation.operands
    ]
