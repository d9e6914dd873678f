"""MeasureLosses: what every operand really costs at the width it was given, beside what was predicted.

    D = mean over images of d(y, y')    (y the float output, y' the output with this operand alone quantized)

d is the objective's divergence, so that for classifiers D is in nats, as the predicted loss is. It takes a forward from
every quantized node on. Put it right after AllocateBits; it decides nothing, the report shows what it finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fxquant.artefact.cache import signature
from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from fxquant.graph.annotation import annotation_of, planned_nodes
from fxquant.graph.facts import Fact
from fxquant.sensitivity.measured import Assignment, Divergence, remaining
from passes.allocate.score_layers import described_candidates
from passes.pipeline.contract import PassContext
from passes.search.search_scales import SCALES_SEARCHED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED

REALISED = "realised_losses"
"""The journal's note: by layer, the measured divergence of each operand, None where it stays float."""


@dataclass(frozen=True)
class MeasureLosses:
    """Measure the divergence of every operand at its width.

    images: how many calibration images it is measured on, the first ones; None: all of them.
    """

    images: int | None = None

    requires: ClassVar[frozenset[Fact]] = frozenset({SCALES_SEARCHED, BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def __post_init__(self) -> None:
        """Raise CalibrationError for a number of images that is none."""
        check_fields(self, CalibrationError)
        if self.images is not None and self.images < 1:
            raise CalibrationError(f"losses are measured on at least one image, not on {self.images}")

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Note the losses, in the unit of the objective; changes no node, so it returns 0.

        Raises CalibrationError where the output is not what the objective takes, SensitivityError where it is not
        finite.
        """
        nodes = [node for node in planned_nodes(graph_module) if annotation_of(node).has_bits]
        bits = {annotation_of(node).layer: annotation_of(node).bits for node in nodes}
        described = [described_candidates(annotation_of(node)) for node in nodes]
        key = context.signature(graph_module, REALISED, repr(self), described, list(map(list, bits.values())))
        recalled = context.cache.recall(signature(key), lambda: self._measured(graph_module, context))
        context.note(**{REALISED: recalled})
        return 0

    def _measured(self, graph_module: GraphModule, context: PassContext) -> dict[str, list[float | None]]:
        images = context.images[: self.images]
        divergence = Divergence(graph_module, images, context.batch_size, objective=context.objective)
        nodes = [node for node in planned_nodes(graph_module) if annotation_of(node).has_bits]

        def losses(node: Node) -> list[float | None]:
            bits = annotation_of(node).bits
            places = [index for index, width in enumerate(bits) if width is not None]
            alone: list[Assignment] = [
                {node: tuple(width if index == place else None for index, width in enumerate(bits))} for place in places
            ]
            found = dict(zip(places, divergence.of_each(alone), strict=True))
            return [float(f"{found[index]:.5g}") if index in found else None for index in range(len(bits))]

        found = context.deal("measuring losses", losses, nodes, remaining(graph_module, nodes))
        return dict(zip((annotation_of(node).layer for node in nodes), found, strict=True))
