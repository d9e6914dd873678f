"""Measured divergence: how far the model's output moves when chosen nodes are quantized and the rest is not.

    D = mean over images of d(y, y'),    y the float output, y' the output with these nodes quantized

d is that of the objective (`fxquant.sensitivity.objective`): for classifiers the KL divergence between their classes.

Of one layer at b bits this is Mix-QViT's quantization sensitivity S_l(b), "the performance change when layer l alone
runs at b bits, all others at a baseline precision", with the label-free divergence for the performance.

What precedes the first changed node is the same for every candidate, so it is computed once: the values live there are
kept for all images, and every candidate restarts from them. Nodes asked for in graph order cost one forward of prefix
in all; asking for an earlier node starts over. Values are quantized as `SubstituteQuantizers` quantizes them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node

from fxquant.checks.finite import is_finite
from fxquant.errors import SensitivityError
from fxquant.graph.annotation import Candidate, annotation_of
from fxquant.graph.nodes import device_of
from fxquant.sensitivity.objective import CLASSES, Objective, Outputs

Bits = tuple[int | None, ...]
"""Of every operand of one node; None leaves it float."""

Assignment = Mapping[Node, Bits]

_NEEDED_BY = "the measured divergence"
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


class Divergence:
    """Mean divergence of an image between the float model's output and that of an assignment of bits.

    Args:
        graph_module: a graph whose nodes carry candidates (after SearchScales, observers in place); it is only read,
            and must stay as it is while this lives.
        images_bchw: the images that outputs are compared on, float (B, C, H, W), on any device.
        batch_size: images per forward.
        baseline: bits of nodes that an assignment does not name (Mix-QViT's baseline precision), which are float
            without one; the divergence is to the float output in any case.
        objective: what the divergence is, and its unit.

    Memory: besides one batch in work, the values live at one position of the graph, and the outputs, of all images.

    Raises CalibrationError where the output is not what the objective takes, SensitivityError where it is not finite.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        images_bchw: Tensor,
        batch_size: int = 16,
        baseline: Assignment | None = None,
        objective: Objective = CLASSES,
    ) -> None:
        objective.check(graph_module, _NEEDED_BY)
        self.objective = objective
        self._runner = _Runner(graph_module)
        self._batches = [batch.to(device_of(graph_module)) for batch in torch.split(images_bchw, batch_size)]
        self._images = len(images_bchw)
        self._baseline = {node: self._runner.quantized(node, bits) for node, bits in (baseline or {}).items()}
        self._cursor = 0
        self._live = self._inputs()
        self._wanted = [self._doubled(self._runner.finish(0, live, {})) for live in self._live]
        if not all(is_finite(tensor) for wanted in self._wanted for tensor in wanted):
            raise SensitivityError(
                "the float model's output is not finite on the images given: check its weights, and how the "
                "images were preprocessed"
            )

    def of(self, assignment: Assignment) -> float:
        """The divergence of one assignment; fast when first nodes are asked for in graph order.

        Raises SensitivityError for a node of another graph, bits without a candidate, or an output that is not finite.
        """
        return self.of_each([assignment])[0]

    def of_each(self, assignments: Sequence[Assignment]) -> list[float]:
        """The divergence of each assignment, in the order given; evaluated in graph order. Raises as `of` does."""
        starts = [
            min((self._runner.position(node) for node in assignment), default=self._runner.last)
            for assignment in assignments
        ]
        found = [0.0] * len(assignments)
        for index in sorted(range(len(assignments)), key=starts.__getitem__):
            self._move_to(starts[index])
            found[index] = self._from_here(assignments[index])
        return found

    def outputs(self, assignment: Assignment) -> Outputs:
        """The output's tensors under one assignment for all images, float64 (N, ...) each. Raises as `of` does."""
        self._move_to(min((self._runner.position(node) for node in assignment), default=self._runner.last))
        return tuple(torch.cat(tensors) for tensors in zip(*self._outputs(assignment), strict=True))

    def sensitivity(self, node: Node, operands: Sequence[int]) -> tuple[float, ...]:
        """The divergence with these operands of one layer at each of their candidate widths, all of them at the same.

        Args:
            node: the layer; its operands have candidates.
            operands: indices; all other operands, and all other layers, are at the baseline.

        Raises as `of` does.
        """
        annotation = annotation_of(node)
        widths = [candidate.bits for candidate in annotation.operands[operands[0]].candidates]
        count = range(len(annotation.operands))
        assignments: list[Assignment] = [{node: tuple(w if i in operands else None for i in count)} for w in widths]
        return tuple(self.of_each(assignments))

    def _inputs(self) -> list[dict[Node, Any]]:
        return [{self._runner.image: batch} for batch in self._batches]

    def _move_to(self, position: int) -> None:
        """Bring the live values of every batch to just before this position."""
        if position < self._cursor:
            self._cursor, self._live = 0, self._inputs()
        for live in self._live:
            self._runner.advance(self._cursor, position, live, self._baseline)
        self._cursor = position

    def _from_here(self, assignment: Assignment) -> float:
        total = 0.0
        for wanted, found in zip(self._wanted, self._outputs(assignment), strict=True):
            total += float(self.objective.divergence(wanted, found))
        if not total < float("inf"):
            layers = ", ".join(f"{annotation_of(node).layer} at {bits}" for node, bits in assignment.items())
            raise SensitivityError(f"the output is not finite with {layers} quantized: check the candidates there")
        return max(total / self._images, 0.0)  # rounding may leave it just below zero

    def _outputs(self, assignment: Assignment) -> Iterator[Outputs]:
        """The output of every batch, from where the cursor is."""
        quantized = self._baseline | {node: self._runner.quantized(node, bits) for node, bits in assignment.items()}
        for live in self._live:
            yield self._doubled(self._runner.finish(self._cursor, live, quantized))

    def _doubled(self, output: Any) -> Outputs:
        """The tensors that count, float64: small divergences are differences of nearly equal numbers."""
        return tuple(tensor.double() for tensor in self.objective.outputs(output, _NEEDED_BY, finite=False))


def remaining(graph_module: GraphModule, nodes: Sequence[Node]) -> list[float]:
    """How long it takes to measure each node alone: about as many operations as lie between it and the output."""
    positions = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    return [float(len(positions) - positions[node]) for node in nodes]


class _Quantized:
    """One node's quantized operands: its weight (None: float) and quantizers by argument index."""

    def __init__(self, weight: Tensor | None, inputs: Mapping[int, nn.Module]) -> None:
        self.weight, self.inputs = weight, inputs


class _Runner(Interpreter):
    """Runs any stretch of the graph's nodes on values given, some quantized; drops values after their last use."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=True)
        self._nodes = list(graph_module.graph.nodes)
        self._positions = {node: index for index, node in enumerate(self._nodes)}
        self.last = len(self._nodes) - 1
        (self.image,) = (node for node in self._nodes if node.op == "placeholder")
        self._active: Mapping[Node, _Quantized] = {}

    def position(self, node: Node) -> int:
        """The node's index; raises SensitivityError for a node of another graph."""
        if node not in self._positions:
            raise SensitivityError(f"node {node} is not part of the graph that this divergence is measured on")
        return self._positions[node]

    def quantized(self, node: Node, bits: Bits) -> _Quantized:
        """The node's operands at these bits; raises SensitivityError where there is no such candidate."""
        self.position(node)
        weight, inputs = None, {}
        for operand, width in zip(annotation_of(node).operands, bits, strict=True):
            if width is None:
                continue
            quantizer = _chosen(node, operand.candidates, width)
            if operand.argument is None:
                kept = self._module_of(node).weight
                weight = quantizer(kept.flatten(1)).reshape(kept.shape)
            else:
                inputs[operand.argument] = quantizer
        return _Quantized(weight, inputs)

    @torch.no_grad()
    def advance(self, start: int, stop: int, values: dict[Node, Any], active: Mapping[Node, _Quantized]) -> None:
        """Run nodes start to stop (excluded) on the values live at start; leaves there those live at stop."""
        self.env, self._active = values, active
        for node in self._nodes[start:stop]:
            if node is not self.image:
                values[node] = self.run_node(node)
            for used in self.user_to_last_uses.get(node, ()):
                del values[used]

    def finish(self, start: int, values: Mapping[Node, Any], active: Mapping[Node, _Quantized]) -> Any:
        """The graph's output from the values live at start, which are kept."""
        live = dict(values)
        self.advance(start, self.last, live, active)
        return self.run_node(self._nodes[-1])

    def run_node(self, node: Node) -> Any:
        """One node on the values at hand, quantized where it is to be."""
        quantized = self._active.get(node)
        if quantized is None and not self._writes(node):
            return super().run_node(node)
        arguments, keywords = self.fetch_args_kwargs_from_env(node)
        if quantized is None:
            # The value may be live for other candidates, so it is not written into.
            return getattr(self, node.op)(node.target, (arguments[0].clone(), *arguments[1:]), keywords)
        arguments = tuple(
            quantized.inputs[index](value) if index in quantized.inputs else value
            for index, value in enumerate(arguments)
        )
        if quantized.weight is None:
            return getattr(self, node.op)(node.target, arguments, keywords)
        return functional_call(self._module_of(node), {"weight": quantized.weight}, arguments, keywords)

    def _module_of(self, node: Node) -> Any:
        return self.submodules[str(node.target)]

    def _writes(self, node: Node) -> bool:
        """Whether the node changes its first argument."""
        if node.op == "call_module":
            return bool(getattr(self._module_of(node), "inplace", False))
        name = str(node.target)
        method = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
        return method or node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))


def _chosen(node: Node, candidates: Sequence[Candidate], bits: int) -> nn.Module:
    for candidate in candidates:
        if candidate.bits == bits:
            return candidate.quantizer
    found = [candidate.bits for candidate in candidates]
    raise SensitivityError(f"{annotation_of(node).layer or node} has no candidate of {bits} bits there, only {found}")
