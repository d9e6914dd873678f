"""SubstituteQuantizers: replace every node that has bits by one that computes with them (simulated execution).

Reads the annotations only; takes the observers out. A node keeps its name, place and annotation, so the printed graph
shows where the bits went. Not done here: integer execution (Lower).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.errors import PatternError, VerificationError
from fxquant.graph.annotation import Annotation, Candidate, Operand, annotation_of, nodes_with_role
from fxquant.graph.facts import QUANTIZED, Fact, broken_at, missing
from fxquant.graph.names import add_module, exchange_module
from fxquant.quantizers.levels import levels_of
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedInput, QuantizedLinear, QuantizedMatmul
from passes.pipeline.contract import PassContext
from passes.search.calibrate import STATISTICS
from passes.search.insert_observers import OBSERVED, remove_observers
from passes.search.search_scales import SCALES_SEARCHED


def _check_bits(graph_module: GraphModule) -> None:
    """Some node has bits, and each of its widths is one that it has a quantizer for."""
    annotated = [(node, annotation_of(node)) for node in nodes_with_role(graph_module)]
    if not any(annotation.has_bits for _, annotation in annotated):
        raise missing("no node has bits", "AllocateBits")
    for node, annotation in annotated:
        for operand in annotation.operands:
            widths = [candidate.bits for candidate in operand.candidates]
            if operand.bits not in widths and (operand.bits is not None or widths):
                listed = f"among {widths}" if widths else "there: this operand has no candidates"
                problem = f"{operand.bits} bits of its {operand.source} operand are not {listed}"
                raise broken_at(node, problem, "allocate among the candidates, or search that width")


BITS_ALLOCATED = Fact("bits allocated", _check_bits, rests_on=frozenset({SCALES_SEARCHED}))
"""Some nodes have bits, and every width is one of the tensor's candidates. AllocateBits, in a room above, provides it.
"""


LEVELS = "levels"
"""The journal's note of the levels of the chosen quantizers, by layer."""


@dataclass(frozen=True)
class SubstituteQuantizers:
    """Put the chosen quantizers into the graph."""

    requires: ClassVar[frozenset[Fact]] = frozenset({BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({QUANTIZED})
    breaks: ClassVar[frozenset[Fact]] = STATISTICS | {OBSERVED, SCALES_SEARCHED}

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Substitute in place; returns the number of nodes that now compute in low bits.

        Notes, by layer, the levels of every operand's quantizer to five digits, None where an operand stays float.
        """
        changed = 0
        levels: dict[str, list[list[float] | None]] = {}
        for node in nodes_with_role(graph_module):
            annotation = annotation_of(node)
            if not annotation.has_bits:
                continue
            _replace(graph_module, node, _quantized(graph_module, node, annotation))
            levels[annotation.layer] = [_levels(operand, annotation.layer) for operand in annotation.operands]
            changed += 1
        context.note(**{LEVELS: levels})
        remove_observers(graph_module)
        graph_module.delete_all_unused_submodules()
        graph_module.graph.lint()
        graph_module.recompile()
        return changed


def chosen(operand: Operand, layer: str) -> Candidate | None:
    """The candidate of an operand's width, None where it has no bits.

    Args:
        operand: with its candidates, and the width that it was given.
        layer: the layer's name, for the message.

    Raises VerificationError, naming the layer, where it has bits and no candidate of that width.
    """
    if operand.bits is None:
        return None
    found = next((candidate for candidate in operand.candidates if candidate.bits == operand.bits), None)
    if found is None:
        widths = [candidate.bits for candidate in operand.candidates]
        listed = f"its candidates have {widths}" if widths else "this operand has no candidates"
        raise VerificationError(
            f"layer '{layer}' has {operand.bits} bits, and {listed}: allocate among the candidates, or search that "
            f"width, SearchScales(bits=...)"
        )
    return found


def _quantized(graph_module: GraphModule, node: Node, annotation: Annotation) -> nn.Module:
    candidates = {operand.argument: chosen(operand, annotation.layer) for operand in annotation.operands}
    # Copies: what is compiled may be moved to another device, and whoever searched still has the candidates.
    inputs = {place: copy.deepcopy(found.quantizer) for place, found in candidates.items() if found is not None}
    weight_quantizer = inputs.get(None)
    if node.op != "call_module":
        return QuantizedMatmul(inputs.get(0), inputs.get(1))
    module = graph_module.get_submodule(str(node.target))
    if isinstance(module, nn.Linear):
        return QuantizedLinear(module.weight, module.bias, weight_quantizer, inputs.get(0))
    if isinstance(module, nn.Conv2d):
        geometry: dict[str, Any] = {
            "stride": module.stride, "padding": module.padding, "dilation": module.dilation, "groups": module.groups
        }  # fmt: skip
        return QuantizedConv2d(module.weight, module.bias, weight_quantizer, inputs.get(0), geometry)
    if 0 in inputs:
        return QuantizedInput(module, inputs[0])
    raise PatternError(f"node {node.name} has bits, and there is no quantizer for a {type(module).__name__}")


def _levels(operand: Operand, layer: str) -> list[float] | None:
    candidate = chosen(operand, layer)
    if candidate is None:
        return None
    found = levels_of(candidate.quantizer, of_weight=operand.argument is None)
    return [float(f"{level:.5g}") for level in found]


def _replace(graph_module: GraphModule, node: Node, replacement: nn.Module) -> None:
    if node.op == "call_module":
        exchange_module(graph_module, node, replacement)
    else:
        node.op, node.target = "call_module", add_module(graph_module, annotation_of(node).layer, replacement)
