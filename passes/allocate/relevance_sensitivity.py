"""RelevanceSensitivity: Mix-QViT's metric for ScoreLayers, importance times sensitivity.

    score_l(b) = I_l S_l(b)

I_l: layer-wise relevance of the predicted class (`fxquant.sensitivity.relevance`), over all scored layers summing to
their number, so that leaving it out is I = 1. S_l(b): divergence when this layer alone runs at b bits
(`fxquant.sensitivity.measured`), in the unit of the objective; leaving it out is S = 4^-b, the noise of uniform
quantization, as in LRP-QViT, which has relevance only. Either is measured on the calibration images and kept in the
cache: importance under one key, sensitivity under one a layer, so that a run that stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch.fx import GraphModule, Node

from fxquant.artefact.cache import signature
from fxquant.checks.hints import check_fields
from fxquant.errors import SensitivityError
from fxquant.graph.annotation import Operand, Source, annotation_of, planned_nodes
from fxquant.sensitivity.measured import Bits, Divergence, remaining
from fxquant.sensitivity.relevance import Relevance
from fxquant.sensitivity.sums import Sums
from passes.allocate.score_layers import Scores, described_candidates, halves
from passes.pipeline.contract import PassContext

LayerScores = dict[str, list[list[float]]]
"""By layer: of each operand, one score per candidate width."""


@dataclass(frozen=True)
class RelevanceSensitivity:
    """Importance times sensitivity, or one of them.

    Args:
        importance, sensitivity: "none" leaves it out.
        operands: "separate" measures weights and inputs of a layer each for itself; "together" measures both at one
            width and gives either half, for allocators that tie them.
        baseline_bits: width of all other layers while one is measured; None leaves them float. Scores of layers without
            relevance (softmax and LayerNorm inputs under the fully quantized protocol) count as the mean layer.
    """

    importance: Literal["relevance", "none"] = "relevance"
    sensitivity: Literal["measured", "none"] = "measured"
    operands: Literal["separate", "together"] = "separate"
    baseline_bits: int | None = None

    def __post_init__(self) -> None:
        """Raise SensitivityError where nothing is left to score by."""
        check_fields(self, SensitivityError)
        if self.baseline_bits is not None and not 2 <= self.baseline_bits <= 8:
            raise SensitivityError(f"baseline_bits is a width from 2 to 8, or None, not {self.baseline_bits}")
        if self.importance == self.sensitivity == "none":
            raise SensitivityError("importance and sensitivity are both left out: keep one, or leave out ScoreLayers")

    def score(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> Scores:
        """Scores of these nodes. Notes `importance` (sums to 1) and `sensitivity` by layer.

        Args: see `Metric.score`.
        """
        layers = [annotation_of(node).layer for node in nodes]
        notes: dict[str, Any] = {}
        factor = dict.fromkeys(layers, 1.0)
        if self.importance == "relevance":
            found = _importance(graph_module, context)
            notes["importance"] = {layer: found[layer] for layer in layers if layer in found}
            mean = sum(notes["importance"].values()) / len(notes["importance"])
            factor |= {layer: value / mean for layer, value in notes["importance"].items()}
        if self.sensitivity == "none":
            scores = self._by_width(nodes)
        else:
            scores = self._measured(graph_module, nodes, context)
            notes["sensitivity"] = scores
        scaled = {
            layer: [[factor[layer] * value for value in values] for values in operands]
            for layer, operands in scores.items()
        }
        return Scores(scaled, notes)

    def _by_width(self, nodes: Sequence[Node]) -> LayerScores:
        """4^-b of every width that a layer has to choose; tied inputs have it together."""
        found = {}
        for annotation in map(annotation_of, nodes):
            sharing = {index: len(group) for group in annotation.groups for index in group}
            found[annotation.layer] = [
                [4.0**-c.bits / sharing[index] for c in operand.candidates]
                for index, operand in enumerate(annotation.operands)
            ]
        return found

    def _measured(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> LayerScores:
        baseline = self._baseline(graph_module)
        described = [described_candidates(annotation_of(node)) for node in baseline]
        common = context.signature(graph_module, "sensitivity", self.operands, self.baseline_bits, described)
        divergence: Divergence | None = None

        def measure(node: Node) -> list[list[float]]:
            nonlocal divergence
            if divergence is None:  # the first layer that is not in the cache
                divergence = Divergence(graph_module, context.images, context.batch_size, baseline, context.objective)
            return self._layer(divergence, node)

        def sensitivity(node: Node) -> list[list[float]]:
            annotation = annotation_of(node)
            key = signature(common, annotation.layer, described_candidates(annotation))
            found: list[list[float]] = context.cache.recall(key, partial(measure, node))
            return found

        found = context.deal("measuring sensitivity", sensitivity, nodes, remaining(graph_module, nodes))
        return dict(zip((annotation_of(node).layer for node in nodes), found, strict=True))

    def _layer(self, divergence: Divergence, node: Node) -> list[list[float]]:
        """Sensitivities of one layer by operand; the width of an image is no choice, so it is not tied."""
        operands = annotation_of(node).operands
        if self.operands == "together" and len(operands) == 2 and all(map(_is_free, operands)):
            return halves(divergence.sensitivity(node, (0, 1)))
        found: list[list[float]] = [[] for _ in operands]
        for group in annotation_of(node).groups:
            measured = [index for index in group if operands[index].candidates]
            values = divergence.sensitivity(node, measured) if measured else ()
            for index in measured:
                found[index] = [value / len(measured) for value in values]
        return found

    def _baseline(self, graph_module: GraphModule) -> dict[Node, Bits]:
        """Bits of all observed nodes at the baseline; images at the widest candidate."""
        if self.baseline_bits is None:
            return {}
        return {
            node: tuple(
                None if not o.candidates else self.baseline_bits if _is_free(o) else o.candidates[-1].bits
                for o in annotation_of(node).operands
            )
            for node in planned_nodes(graph_module)
        }


def _is_free(operand: Operand) -> bool:
    """Whether its width is a choice: it is quantized, and no image."""
    return bool(operand.candidates) and operand.source is not Source.IMAGE


def _importance(graph_module: GraphModule, context: PassContext) -> dict[str, float]:
    """I_l by layer, from the cache or the images."""

    def measure() -> dict[str, float]:
        sums = Sums()
        batches = (batch for _, batch in context.gather("relevance", sums, graph_module))
        return Relevance(graph_module).importance(batches, sums)

    found: dict[str, float] = context.cache.recall(context.signature(graph_module, "importance"), measure)
    return found
