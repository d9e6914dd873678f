"""PackLayers: build what is planned, integer modules with packed weights in the place of the simulated ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.facts import Fact
from fxquant.graph.names import exchange_module
from fxquant.graph.nodes import module_of
from fxquant.runtime.integer.lowered import IntegerConv2d, IntegerLinear, IntegerMatmul
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedLinear
from passes.lower.integer_plan import Planned, note_kernel, planned_nodes, planned_of, set_planned
from passes.lower.rewrite import REQUIRES
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class PackLayers:
    """Build every planned node."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Build in place; returns how many nodes."""
        nodes = planned_nodes(graph_module)
        for node in nodes:
            planned = planned_of(node)
            assert planned is not None  # it is one of them
            kernel = _build(graph_module, node, planned)
            note_kernel(graph_module, f"{kernel} {library.instruction_set()}", *planned.layers)
            set_planned(node, None)
        return len(nodes)


def _build(graph_module: GraphModule, node: Node, planned: Planned) -> str:
    """Put the integer module in the place of the simulated one; returns the kernel's name."""
    module = module_of(graph_module, node)
    replacement: nn.Module
    if isinstance(module, QuantizedConv2d):
        replacement, kernel = IntegerConv2d(module, planned.codes[0]), "convolution"
    elif isinstance(module, QuantizedLinear):
        replacement, kernel = IntegerLinear(module, planned.codes[0], planned.epilogue), "linear"
    else:
        replacement, kernel = IntegerMatmul(*planned.codes), "matmul"
    exchange_module(graph_module, node, replacement)
    return kernel
