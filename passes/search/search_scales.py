"""SearchScales: for every quantized tensor and every candidate width, the best quantizer of its family.

Criteria: "hessian" (PTQ4ViT's, with the gradient done right; or the layer's plain output error, where Calibrate
gathered that instead), "mse" (squared error of the tensor itself), "min-max" (no search: the range just covers the
data). What is found lands in the nodes' annotations, with the predicted loss and
the noise power that sensitivities and allocators read; then the observers' statistics are released.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.artefact.cache import Cache
from fxquant.artefact.searched_graph import candidates_from_file, candidates_to_file
from fxquant.checks.hints import check_fields
from fxquant.errors import ArtefactError, CalibrationError
from fxquant.graph.annotation import Candidate, Operand, Role, annotate_operands, annotation_of, planned_nodes
from fxquant.graph.facts import Fact, broken_at, missing
from fxquant.graph.nodes import device_of, module_of
from fxquant.quantizers.families import FAMILIES
from fxquant.quantizers.observers import Observer
from fxquant.quantizers.search import search_activation, search_weight
from fxquant.quantizers.statistics.outline import CHANNEL, ROW, VALUE, Outline
from passes.pipeline.contract import PassContext
from passes.search.calibrate import CALIBRATED, STATISTICS
from passes.search.drawn_together import Candidates, drawn_together
from passes.search.insert_observers import observers_of
from passes.search.owners import owners_of_nodes

Criterion = Literal["hessian", "mse", "min-max"]
WeightScales = Literal["channel", "tensor"]
WeightWidths = Literal["channel", "tensor"]

ACTIVATION = 10_000  # weights whose search takes as long as that of an activation in one family

OUTLINES = "histograms"
"""The journal's note of the operands' outlines, by layer."""


def _check_scales(graph_module: GraphModule) -> None:
    """Every operand that has families has candidates; each width is listed once, ascending."""
    operands = [(node, operand) for node in planned_nodes(graph_module) for operand in annotation_of(node).operands]
    if not any(operand.candidates for _, operand in operands):
        raise missing("no operand has candidates", "SearchScales")
    for node, operand in operands:
        bits = [candidate.bits for candidate in operand.candidates]
        if operand.families and not bits:
            raise broken_at(node, f"its {operand.source} operand has no candidates", "run SearchScales again")
        if bits != sorted(set(bits)):
            raise broken_at(node, f"it has candidates of {bits} bits", "list each width once, ascending")


SCALES_SEARCHED = Fact("scales searched", _check_scales, rests_on=frozenset({CALIBRATED}))
"""Quantized tensors have candidates, ascending by bits."""


@dataclass(frozen=True)
class SearchScales:
    """Search scales at all candidate widths.

    Args:
        bits: candidate widths, 2 to 8, ascending.
        criterion: what the search minimises: "hessian", "mse" or "min-max"; see the module.
        keep_grams: whether the Gram matrices of weights' inputs are kept, which CompensateWeights needs. All else that
            observers have gathered is released.
        negligible: a difference of predicted losses, in the unit of the objective, that does not count: of an operand's
            families the first named is taken that loses at most so much more than the best.
        weight_scales: whether a weight has a scale for each output channel, or one for the whole tensor.
        weight_widths: "tensor", one width for each weight; "channel", channels of symmetric weights have widths of
            their own, at a mean of 3 to 5 bits whose neighbours are among `bits`: see
            `fxquant.quantizers.uniform_channels`. The head keeps one width: its channels are classes, and the
            calibration images are of few of them.
        dampening: that of CompensateWeights, where the pipeline has it: then weights are searched, and their losses
            predicted, by what later columns cannot make up for; for "hessian". None: they are rounded to nearest.
        shrinkage: 0 to 1, how far predicted losses of weights are drawn to their mean, in logarithms; see
            `passes.search.drawn_together`.
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    criterion: Criterion = "hessian"
    keep_grams: bool = False
    negligible: float = 0.0
    weight_scales: WeightScales = "channel"
    weight_widths: WeightWidths = "tensor"
    dampening: float | None = None
    shrinkage: float = 0.0

    @property
    def requires(self) -> frozenset[Fact]:
        """The calibration."""
        return frozenset({CALIBRATED})

    @property
    def provides(self) -> frozenset[Fact]:
        """Candidates of every width."""
        return frozenset({SCALES_SEARCHED})

    @property
    def breaks(self) -> frozenset[Fact]:
        """The calibration; and, unless they are kept, Gram matrices: both are released."""
        return frozenset({CALIBRATED}) if self.keep_grams else STATISTICS

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if not self.bits or list(self.bits) != sorted(set(self.bits)) or not 2 <= self.bits[0] <= self.bits[-1] <= 8:
            raise CalibrationError(f"candidate bits must be ascending, distinct and between 2 and 8, not {self.bits}")
        if self.negligible < 0:
            raise CalibrationError(f"negligible is a loss in nats, at least 0, not {self.negligible}")
        if not 0 <= self.shrinkage <= 1:
            raise CalibrationError(f"shrinkage is from 0 to 1, not {self.shrinkage}")
        if self.dampening is not None and self.dampening < 0:
            raise CalibrationError(f"dampening is a share of the mean diagonal, at least 0, not {self.dampening}")
        if self.dampening is not None and self.criterion != "hessian":
            raise CalibrationError(f"dampening is of Gram matrices, which only criterion='hessian' reads; found {self}")
        if self.weight_widths == "channel" and (self.weight_scales == "tensor" or self.criterion == "min-max"):
            raise CalibrationError(
                'weight_widths="channel" needs scales of channels that are searched: weight_scales="channel", and '
                f'"hessian" or "mse" for a criterion; found {self}'
            )

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Search every observed node; returns how many nodes were given candidates.

        Notes, by layer, the outline of every operand that is quantized, None for the others.
        """
        nodes = planned_nodes(graph_module)

        def searched(node: Node) -> tuple[tuple[tuple[Candidate, ...], ...], list[Any]]:
            observers = dict(observers_of(graph_module, node))
            for observer in observers.values():
                observer.check_here()
            found = self._recalled(graph_module, node, observers, context.cache)
            outlines = _outlines(graph_module, node, observers)
            for observer in observers.values():
                observer.release(keep_gram=self.keep_grams)
            return found, outlines

        costs, owners = [_cost(graph_module, node) for node in nodes], owners_of_nodes(graph_module, nodes)
        found = context.deal("searching scales", searched, nodes, costs, owners)
        device = device_of(graph_module)
        every = self._drawn(nodes, [candidates for candidates, _ in found])
        for node, candidates in zip(nodes, every, strict=True):
            here = [placed(each, device) for each in candidates]
            annotate_operands(node, candidates=here, scores=[()] * len(here))
            for _, observer in observers_of(graph_module, node):
                observer.release(keep_gram=self.keep_grams)
        outlines = {annotation_of(node).layer: each for node, (_, each) in zip(nodes, found, strict=True)}
        context.note(**{OUTLINES: outlines})
        return len(nodes)

    def _drawn(self, nodes: list[Node], found: list[tuple[Candidates, ...]]) -> list[tuple[Candidates, ...]]:
        """The candidates of every node's operands with losses of weights drawn together."""
        weights = {
            (number, place): operand.elements
            for number, node in enumerate(nodes)
            for place, operand in enumerate(annotation_of(node).operands)
            if operand.argument is None and found[number][place]
        }
        drawn = drawn_together([found[number][place] for number, place in weights], [*weights.values()], self.shrinkage)
        by_place = dict(zip(weights, drawn, strict=True))
        return [
            tuple(by_place.get((number, place), each) for place, each in enumerate(candidates))
            for number, candidates in enumerate(found)
        ]

    def _recalled(
        self, graph_module: GraphModule, node: Node, observers: Mapping[int, Observer], cache: Cache
    ) -> tuple[tuple[Candidate, ...], ...]:
        """Candidates of each operand of a node; a killed process has left those it had."""

        def searched() -> tuple[tuple[Candidate, ...], ...]:
            found = (self._searched(graph_module, node, operand, observers) for operand in annotation.operands)
            return tuple(placed(candidates, device) for candidates in found)

        annotation, device = annotation_of(node), device_of(graph_module)
        if cache.folder is None:
            return searched()
        statistics = [[o.families, o.keeps_gram, o.images, o.state()] for o in observers.values()]
        module = module_of(graph_module, node)
        weights = annotation.weight and annotation.weight.families
        key = cache.key_of(repr(self), statistics, module, weights, annotation.role)
        kept = cache.read(key, part=True)
        if kept is not None:
            return tuple(placed(candidates, device) for candidates in candidates_from_file(*kept))
        found = searched()
        with suppress(ArtefactError):  # a quantizer that no file can hold
            cache.write(key, *candidates_to_file(found), part=True)
        return found

    def _searched(
        self, graph_module: GraphModule, node: Node, operand: Operand, observers: Mapping[int, Observer]
    ) -> tuple[Candidate, ...]:
        """The candidates of one operand; none where it stays float."""
        if not operand.families:
            return ()
        if operand.argument is None:
            return self._weight(graph_module, node, operand, observers[0])
        return self._activation(observers[operand.argument])

    def _activation(self, observer: Observer) -> tuple[Candidate, ...]:
        statistics = observer.statistics()
        weighted = self.criterion == "hessian"
        if weighted and not statistics.moments.weighted:
            raise CalibrationError(
                'SearchScales(criterion="hessian") needs gradients or output errors, and Calibrate gathered '
                "neither: run Calibrate(gradient=True), or Calibrate(output_error=True)"
            )
        named = observer.families
        if self.criterion == "min-max":
            named = tuple(
                family._replace(name=covering) if (covering := f"{family.name}-min-max") in FAMILIES else family
                for family in named
            )
        best = []
        for bits in self.bits:
            # Where no family reaches a width, AllocateBits does not allow it; the column is filled all the same.
            reaching = [family for family in named if bits <= family.widest_bits] or named
            usable = [
                search_activation(statistics, FAMILIES[family.name], (bits,), observer.images, weighted)[0]
                for family in reaching
            ]
            enough = min(candidate.loss for candidate in usable) + self.negligible
            best.append(next((candidate for candidate in usable if candidate.loss <= enough), usable[0]))
        return tuple(best)

    def _weight(
        self, graph_module: GraphModule, node: Node, operand: Operand, observer: Observer
    ) -> tuple[Candidate, ...]:
        module = graph_module.get_submodule(str(node.target))
        if not isinstance(module, nn.Linear | nn.Conv2d):
            return ()
        hessian = self.criterion == "hessian"
        asymmetric = [family.name for family in operand.families] == ["asymmetric"]
        is_head = annotation_of(node).role is Role.HEAD
        return search_weight(
            module.weight.flatten(1),
            self.bits,
            max(observer.images, 1),
            observer.gram.matrix() if hessian and observer.gram is not None else None,
            observer.channel_weight() if hessian else None,
            search=self.criterion != "min-max",
            dampening=self.dampening,
            asymmetric=asymmetric,
            per_tensor=self.weight_scales == "tensor",
            mixed=self.weight_widths == "channel" and not asymmetric and not is_head,
        )


def placed(candidates: tuple[Candidate, ...], device: torch.device) -> tuple[Candidate, ...]:
    """The candidates with their quantizers on a device; those of activations are found on the host."""
    for candidate in candidates:
        candidate.quantizer.to(device)
    return candidates


def _cost(graph_module: GraphModule, node: Node) -> float:
    """How long a node's search takes, in weights of a search among scales; see the module."""
    found = 0.0
    for operand in annotation_of(node).operands:
        module = module_of(graph_module, node)
        if operand.argument is not None:
            found += ACTIVATION * len(operand.families)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            found += module.weight.numel()
    return found


def _outlines(graph_module: GraphModule, node: Node, observers: Mapping[int, Observer]) -> list[Any]:
    """JSON values: of each operand its outline, None where it stays float."""
    found: list[Any] = []
    for operand in annotation_of(node).operands:
        module = module_of(graph_module, node)
        if operand.families and operand.argument is not None:
            statistics = observers[operand.argument].statistics()
            unit = ROW if statistics.moments is statistics.row_moments else VALUE
            unit = unit if statistics.channel_factor is None else CHANNEL
            found.append(Outline.of_moments(statistics.moments, unit).to_json())
        elif operand.families and isinstance(module, nn.Linear | nn.Conv2d):
            found.append(Outline.of_tensor(module.weight).to_json())
        else:
            found.append(None)
    return found
