"""The float network and the quantized one side by side, block by block: what passes that rewrite weights walk along.

Of the calibration images' activations only those at one block's ends are held. The quantized network's inputs of a
block come from its own, already rewritten, prefix; targets come from the float network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant import ranks
from fxquant.artefact.cache import signature
from fxquant.graph.annotation import Candidate, Operand, annotate_operands, annotation_of, nodes_with_role
from fxquant.graph.nodes import device_of
from fxquant.graph.structure.blocks import Block, cut, extract
from fxquant.quantizers.quantizer import Quantizer
from fxquant.runtime.simulated import QuantizedInput, QuantizedMatmul, QuantizedWeightModule
from passes.pipeline.contract import PassContext
from passes.search.insert_observers import remove_observers
from passes.substitute.substitute_quantizers import SubstituteQuantizers

QUANTIZER_PLACES = ("input_quantizer", "left_quantizer", "right_quantizer")


@dataclass(frozen=True)
class BlockPair:
    """One block of both networks and the calibration images' values at its ends.

    Args:
        index: the position of the block, from 0.
        block: its name and its ends.
        original, quantized: the block as graph modules that share modules with the whole networks.
        float_input, quantized_input, target: float (N, ...), on the device of the networks; target is the float block's
            output for float_input.
    """

    index: int
    block: Block
    original: GraphModule
    quantized: GraphModule
    float_input: Tensor
    quantized_input: Tensor
    target: Tensor

    def layers(self) -> list[tuple[Node, QuantizedWeightModule, nn.Linear | nn.Conv2d]]:
        """Layers with quantized weights, see `weight_layers`."""
        return weight_layers(self.original, self.quantized)

    def quantizers(self) -> list[tuple[str, nn.Module, str]]:
        """Activation quantizers of the block, see `activation_quantizers`."""
        return activation_quantizers(self.quantized)


def weight_layers(
    original: GraphModule, quantized: GraphModule
) -> list[tuple[Node, QuantizedWeightModule, nn.Linear | nn.Conv2d]]:
    """Layers with quantized weights: (node of `quantized`, its module, the float module), in graph order."""
    floats = {node.name: node for node in original.graph.nodes}
    found = []
    for node in quantized.graph.nodes:
        module = quantized.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, QuantizedWeightModule) and module.weight_quantizer is not None:
            layer = original.get_submodule(floats[node.name].target)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found.append((node, module, layer))
    return found


def activation_quantizers(quantized: GraphModule) -> list[tuple[str, nn.Module, str]]:
    """Activation quantizers: (path of the module, the module, its attribute)."""
    found: list[tuple[str, nn.Module, str]] = []
    for path, module in quantized.named_modules():
        if isinstance(module, QuantizedWeightModule | QuantizedMatmul | QuantizedInput):
            found += [(path, module, a) for a in QUANTIZER_PLACES if isinstance(getattr(module, a, None), nn.Module)]
    return found


class BlockPairs:
    """Both networks of a graph with bits; iterate for the pairs, changing a pair's quantized modules on the way.

    Args:
        graph_module: with observers and bits; it is not changed.
        context: gives the calibration images.
        device: where the networks run, images are moved there; None: where the graph's weights are.
    """

    def __init__(self, graph_module: GraphModule, context: PassContext, device: torch.device | None = None) -> None:
        self.context = context
        self.device = device or device_of(graph_module)
        bare = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        remove_observers(bare)
        self.original = copy.deepcopy(bare).eval().to(self.device)
        self.quantized: GraphModule
        self.take(graph_module)
        self.blocks = cut(self.quantized)

    def take(self, graph_module: GraphModule) -> None:
        """Make the quantized network anew, of this graph with bits, whose weights may have been rewritten since."""
        substituted = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        SubstituteQuantizers().apply(substituted, self.context)
        self.quantized = copy.deepcopy(substituted).eval().to(self.device)

    def signature(self, *settings: Any) -> str:
        """What a result depends on: both networks with codes and scales, quantizers, images, settings, device."""
        quantizers = [repr(module) for module in self.quantized.modules() if not list(module.children())]
        quantized = signature(self.quantized, self.quantized.code)
        sizes = [self.context.batch_size, self.device.type]
        return self.context.signature(self.original, quantized, quantizers, sizes, *settings)

    def __iter__(self) -> Iterator[BlockPair]:
        """The pairs in order, over all images."""
        return self.over(self.context.images)

    def over(self, images_bchw: Tensor) -> Iterator[BlockPair]:
        """The pairs in order; a block's quantized output is computed after the caller is done with it."""
        inputs = images_bchw.to(self.device)
        float_input = quantized_input = inputs
        for index, block in enumerate(self.blocks):
            original = extract(self.original, block.source, block.result)
            quantized = extract(self.quantized, block.source, block.result)
            target = self.run(original, float_input)
            yield BlockPair(index, block, original, quantized, float_input, quantized_input, target)
            quantized_input, float_input = self.run(quantized, quantized_input), target

    def run(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The module's output for all inputs (N, ...), batch by batch, without gradients; ranks share batches out."""
        with torch.no_grad():
            batches = torch.split(inputs, self.context.batch_size)
            # In one order in memory, as they come from another rank.
            found = ranks.dealt("running blocks", lambda batch: module(batch).contiguous(), batches)
        return torch.cat([batch.to(self.device) for batch in found])


def adopt(graph_module: GraphModule, quantized: GraphModule) -> int:
    """Give the graph module what its quantized copy has learned; returns how many layers' weights.

    Weights lie on their grid afterwards, so that substitution finds exactly the copy's codes; biases and whatever else
    is float are taken over; candidates of the allocated widths get the copy's quantizers (their predicted losses stay
    as searched).
    """
    copies = {node.name: node for node in quantized.graph.nodes}
    rest = {name.replace(".inner.", "."): parameter for name, parameter in quantized.named_parameters()}
    for name, parameter in graph_module.named_parameters():
        if name in rest:
            parameter.data = rest[name].detach().to(parameter.device, parameter.dtype, copy=True)
    changed = 0
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        if not annotation.has_bits:
            continue
        learned = quantized.get_submodule(str(copies[node.name].target))
        if isinstance(learned, QuantizedWeightModule):
            layer: Any = graph_module.get_submodule(str(node.target))
            layer.weight = _like(learned.weight, layer.weight)
            if learned.bias is not None:
                layer.bias = _like(learned.bias, layer.weight)
            changed += 1
        device = device_of(graph_module)
        annotate_operands(node, candidates=[_learned(operand, learned, device) for operand in annotation.operands])
    return changed


def _learned(operand: Operand, module: nn.Module, device: torch.device) -> tuple[Candidate, ...]:
    """An operand's candidates, that of its width with the quantizer that the module has for it."""
    quantizer: Quantizer | None = getattr(module, _place(operand, module), None)
    if quantizer is None:
        return operand.candidates
    return tuple(
        replace(c, quantizer=copy.deepcopy(quantizer).to(device)) if c.bits == operand.bits else c
        for c in operand.candidates
    )


def _place(operand: Operand, module: nn.Module) -> str:
    """The attribute of a quantized module that quantizes an operand."""
    if operand.argument is None:
        return "weight_quantizer"
    return (
        ("left_quantizer", "right_quantizer")[operand.argument]
        if isinstance(module, QuantizedMatmul)
        else "input_quantizer"
    )


def _like(value: Tensor, parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(parameter.device, parameter.dtype, copy=True), requires_grad=False)
