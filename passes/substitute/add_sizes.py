"""AddSizes: graphs for images of other sizes, which call the quantized layers of the graph that passes have worked on.

Scales are of a tensor or of its channels, weights of a layer: neither depends on how many tokens there are. What does
is in the graph alone: shapes, windows and padding, and constants such as position embeddings and masks. So the model
is traced at every size, and each of its layers takes the module that the layer of the same name has; constants that
both graphs have are one tensor. What a rotation of the residual stream does to constants is done to those of each.

That the result is right is proven as at the main size (`passes.pipeline.proof`): its quantizers bypassed and the float
weights restored, it must give what the model gives for two images of that size.

Deliberately not done: calibration at several sizes. Statistics, folds and rounding come from the calibration images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import PipelineError, TraceError
from fxquant.graph.annotation import Operand, annotate, annotation_of, nodes_with_role
from fxquant.graph.facts import LOWERED, QUANTIZED, Fact, declare, facts_of
from fxquant.graph.names import free_name
from fxquant.graph.nodes import constants_by_path, elements_of, tensor_at
from fxquant.graph.notes import SIZES
from passes.pipeline.contract import PassContext, SizedModel
from passes.prepare.rotate_residual import rotate_constants


@dataclass(frozen=True)
class AddSizes:
    """Make a graph for each of the context's other image sizes; the graph itself stays as it is."""

    requires: ClassVar[frozenset[Fact]] = frozenset({QUANTIZED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Write the note SIZES; returns how many graphs there are.

        Raises PipelineError for a lowered graph, TraceError where a size has not the layers that are quantized.
        """
        if LOWERED in facts_of(graph_module):
            raise PipelineError("a lowered graph takes one image size: let the pipeline end before Lower")
        made = {sized.size: _at_size(graph_module, sized, context) for sized in context.sized}
        SIZES.write(graph_module, made)
        return len(made)


def _at_size(graph_module: GraphModule, sized: SizedModel, context: PassContext) -> GraphModule:
    """The graph of one size, with the modules of the main graph."""
    tensors = (*sized.graph_module.parameters(), *sized.graph_module.buffers())
    given = copy.deepcopy(sized.graph_module, {id(tensor): tensor for tensor in tensors})
    rotate_constants(given, context.journal, context.seed)
    partners = _partners(graph_module, given, sized.size)
    constants = constants_by_path(graph_module)
    own = free_name(graph_module, "image_{}x{}".format(*sized.size))
    contents: dict[str, Any] = {}
    for node in given.graph.nodes:
        if node in partners:
            node.op, node.target = "call_module", partners[node].target
            contents[node.target] = graph_module.get_submodule(node.target)
        elif node.op == "call_module":
            contents[f"{own}.{node.target}"] = given.get_submodule(node.target)
            node.target = f"{own}.{node.target}"
        elif node.op == "get_attr":
            tensor = tensor_at(given, node)
            node.target = _path_of(tensor, constants) or f"{own}.{node.target}"
            contents[node.target] = constants.get(node.target, tensor)
    made = GraphModule(contents, given.graph, class_name=type(graph_module).__name__)
    made.meta.update(given.meta)
    declare(made, facts_of(graph_module))
    for node, partner in partners.items():
        operands = tuple(_operand(node, operand) for operand in annotation_of(partner).operands)
        annotate(node, block=annotation_of(partner).block, operands=operands)
    made.graph.lint()
    return made.eval()


def _partners(graph_module: GraphModule, given: GraphModule, size: tuple[int, int]) -> dict[Node, Node]:
    """By node of one size, the node of the main graph whose module it is to call."""
    layers = {annotation_of(node).layer: node for node in nodes_with_role(graph_module)}
    calls = {node.name: node for node in graph_module.graph.nodes if node.op == "call_module"}
    found: dict[Node, Node] = {}
    for node in given.graph.nodes:
        layer = annotation_of(node).layer
        partner = layers.get(layer) if layer else calls.get(node.name) if node.op == "call_module" else None
        if partner is not None and partner.op == "call_module":
            found[node] = partner
        elif node.op == "call_module" and list(given.get_submodule(str(node.target)).parameters()):
            raise _other_layers(size, str(node.target), "is run at this size only")
    taken = set(found.values())
    for layer, node in layers.items():
        if annotation_of(node).has_bits and node not in taken:
            raise _other_layers(size, layer, "is not run at this size")
    return found


def _other_layers(size: tuple[int, int], layer: str, problem: str) -> TraceError:
    return TraceError(
        f"images of {size[0]} x {size[1]} cannot share what is quantized: '{layer}' {problem}. Leave the size out of "
        f"image_sizes, and compile for it by itself"
    )


def _path_of(tensor: Tensor, constants: dict[str, Tensor]) -> str | None:
    """Where the main graph has the same constant."""
    same = (
        path
        for path, other in constants.items()
        if other.dtype == tensor.dtype and other.shape == tensor.shape and torch.equal(other, tensor)
    )
    return next(same, None)


def _operand(node: Node, operand: Operand) -> Operand:
    source = None if operand.argument is None else node.args[operand.argument]
    return replace(operand, elements=elements_of(source)) if isinstance(source, Node) else operand
