"""SubstituteQuantizers: replace every node that has bits by one that computes with them (simulated execution).

Reads the annotations only; takes the observers out. A node keeps its name, place and annotation, so the printed graph
shows where the bits went. Not done here: integer execution (Lower).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.errors import PatternError, VerificationError
from fxquant.graph.annotation import Annotation, Candidate, annotation_of, nodes_with_role
from fxquant.graph.facts import QUANTIZED, Fact, broken_at, missing
from fxquant.graph.names import add_module, exchange_module
from fxquant.quantizers.quantizer import Quantizer
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedInput, QuantizedLinear, QuantizedMatmul
from passes.pipeline.contract import PassContext
from passes.search.calibrate import STATISTICS
from passes.search.insert_observers import OBSERVED, observers_of, remove_observers
from passes.search.search_scales import SCALES_SEARCHED


def _check_bits(graph_module: GraphModule) -> None:
    """Some node has bits, and each of its widths is one that it has a quantizer for."""
    annotated = [(node, annotation_of(node)) for node in nodes_with_role(graph_module)]
    if not any(annotation.has_bits for _, annotation in annotated):
        raise missing("no node has bits", "AllocateBits")
    for node, annotation in annotated:
        for kind, bits, widths in _widths(annotation):
            if bits not in widths and (bits is not None or widths):
                listed = f"among {widths}" if widths else "there: this operand has no candidates"
                problem = f"{bits} {kind} bits are not {listed}"
                raise broken_at(node, problem, "allocate among the candidates, or search that width")


def _widths(annotation: Annotation) -> list[tuple[str, int | None, list[int]]]:
    """What is multiplied, its bits, and the widths that it has candidates of."""
    found = [("weight", annotation.weight_bits, annotation.weight_candidates)]
    inputs = zip(annotation.input_bits, annotation.activation_candidates, strict=True)
    found += [("activation", bits, group) for bits, group in inputs]
    if not annotation.activation_candidates:
        found.append(("activation", annotation.activation_bits, ()))
    return [(kind, bits, [candidate.bits for candidate in candidates]) for kind, bits, candidates in found]


BITS_ALLOCATED = Fact("bits allocated", _check_bits, rests_on=frozenset({SCALES_SEARCHED}))
"""Some nodes have bits, and every width is one of the tensor's candidates. AllocateBits, in a room above, provides it.
"""


@dataclass(frozen=True)
class SubstituteQuantizers:
    """Put the chosen quantizers into the graph."""

    requires: ClassVar[frozenset[Fact]] = frozenset({BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({QUANTIZED})
    breaks: ClassVar[frozenset[Fact]] = STATISTICS | {OBSERVED, SCALES_SEARCHED}

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Substitute in place; returns the number of nodes that now compute in low bits."""
        changed = 0
        for node in nodes_with_role(graph_module):
            annotation = annotation_of(node)
            if not annotation.has_bits:
                continue
            places = [index for index, observer in observers_of(graph_module, node) if observer.family is not None]
            replacement = _quantized(graph_module, node, annotation, places)
            _replace(graph_module, node, replacement)
            changed += 1
        remove_observers(graph_module)
        graph_module.delete_all_unused_submodules()
        graph_module.graph.lint()
        graph_module.recompile()
        return changed


def chosen(candidates: tuple[Candidate, ...], bits: int | None, layer: str) -> Candidate | None:
    """The candidate of this width, None without bits.

    Raises VerificationError, naming the layer, where it has bits and no candidate of that width.
    """
    if bits is None:
        return None
    found = next((candidate for candidate in candidates if candidate.bits == bits), None)
    if found is None:
        widths = [candidate.bits for candidate in candidates]
        listed = f"its candidates have {widths}" if widths else "this operand has no candidates"
        raise VerificationError(
            f"layer '{layer}' has {bits} bits, and {listed}: allocate among the candidates, or search that width, "
            f"SearchScales(bits=...)"
        )
    return found


def _quantized(graph_module: GraphModule, node: Node, annotation: Annotation, places: list[int]) -> nn.Module:
    weight = chosen(annotation.weight_candidates, annotation.weight_bits, annotation.layer)
    groups = annotation.activation_candidates
    if not groups:
        chosen((), annotation.activation_bits, annotation.layer)
    inputs: dict[int, Quantizer] = {}
    for place, candidates, bits in zip(places, groups, annotation.input_bits, strict=True):
        candidate = chosen(candidates, bits, annotation.layer)
        if candidate is not None:
            inputs[place] = candidate.quantizer
    weight_quantizer = None if weight is None else weight.quantizer
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
    raise PatternError(f"node {node.name} has bits but no quantizer fits a {type(module).__name__}")


def _replace(graph_module: GraphModule, node: Node, replacement: nn.Module) -> None:
    if node.op == "call_module":
        exchange_module(graph_module, node, replacement)
    else:
        node.op, node.target = "call_module", add_module(graph_module, annotation_of(node).layer, replacement)
