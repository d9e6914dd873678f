"""ExchangeLinears: linear layers with uniform quantizers become modules that multiply int8 through torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fxquant.graph.annotation import annotation_of
from fxquant.graph.facts import Fact
from fxquant.graph.names import exchange_module
from fxquant.graph.nodes import module_of
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.torch_linear import TorchLinear
from fxquant.runtime.native.library import UNIFORM
from fxquant.runtime.simulated import QuantizedLinear
from passes.lower.exact_codes import integer_nodes, simulated_layers
from passes.lower.integer_plan import note_kernel
from passes.lower.rewrite import REQUIRES, Miss, note_misses
from passes.pipeline.contract import PassContext

UNIFORM_INSTEAD = {
    "post_gelu": "asymmetric", "post_relu": "asymmetric", "post_softmax": "asymmetric", "other": "symmetric",
    "image": "symmetric",
}  # fmt: skip
"""By edge, the family that takes the place of others where only uniform ones run."""


@dataclass(frozen=True)
class ExchangeLinears:
    """Exchange what `uniform_linears` finds. kind: of module. kernel: its name in reports."""

    kind: type[TorchLinear]
    kernel: str

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Exchange in place; returns how many layers."""
        found = uniform_linears(graph_module)
        note_misses(context, self, _misses(graph_module, found), outcome="simulated")
        for node, code in found.items():
            module = module_of(graph_module, node)
            assert isinstance(module, QuantizedLinear)  # it is a linear layer
            exchange_module(graph_module, node, self.kind(module, code))
            note_kernel(graph_module, self.kernel, annotation_of(node).layer)
        return len(found)


def uniform_nodes(graph_module: GraphModule) -> dict[Node, ByteCode]:
    """What runs as integers on uniform codes, with the code of its first input."""
    found = integer_nodes(graph_module).items()
    return {node: codes[0] for node, codes in found if all(code.kind == UNIFORM for code in codes)}


def uniform_linears(graph_module: GraphModule) -> dict[Node, ByteCode]:
    """Linear layers that run as integers on uniform codes, with the code of their input."""
    found = uniform_nodes(graph_module).items()
    return {node: code for node, code in found if isinstance(module_of(graph_module, node), QuantizedLinear)}


def _misses(graph_module: GraphModule, exchanged: Collection[Node]) -> list[Miss]:
    misses = simulated_layers(graph_module)
    for node in integer_nodes(graph_module):
        if node in exchanged:
            continue
        is_linear = isinstance(module_of(graph_module, node), QuantizedLinear)
        reason = "its input has no uniform quantizer" if is_linear else "only linear layers run as integers here"
        misses.append(Miss(annotation_of(node).layer, f"{reason}: 'cpu-native' runs it"))
    return misses
