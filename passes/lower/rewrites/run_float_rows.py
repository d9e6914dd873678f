"""RunFloatRows: layer norms that stay float, and means over tokens, are run by kernels that round alike everywhere.

    layer_norm(x) over the last dimension    ->  NormRows
    x.mean(all dimensions between batch and channels)  ->  AverageRows

The last rewrite: what others look for in a graph is still `nn.LayerNorm` before it. Means that keep their dimensions,
and norms over several, stay torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.facts import Fact
from fxquant.graph.names import add_module, exchange_module
from fxquant.graph.nodes import argument, input_of, module_of
from fxquant.runtime.integer.float_rows import AverageRows, NormRows
from passes.lower.integer_plan import layer_of, shape_of
from passes.lower.rewrite import REQUIRES, Miss, note_misses
from passes.lower.rewrites.fuse_layer_norms import NO_SHAPE, norm_miss
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class RunFloatRows:
    """Replace what matches."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Replace in place; returns how many there were."""
        misses, replaced = [], 0
        for node in list(graph_module.graph.nodes):
            module = module_of(graph_module, node)
            if type(module) is not nn.LayerNorm and node.target not in ("mean", torch.mean):
                continue
            miss = norm_miss(node, module) if type(module) is nn.LayerNorm else _mean_miss(node)
            if miss is not None:
                misses.append(miss)
                continue
            if isinstance(module, nn.LayerNorm):
                exchange_module(graph_module, node, NormRows(module))
            else:
                _average(graph_module, node)
            replaced += 1
        note_misses(context, self, misses)
        return replaced


def _mean_miss(node: Node) -> Miss | None:
    """Why the kernel does not take a mean; None where it does."""
    shape = shape_of(input_of(node))
    if shape is None or shape_of(node) is None or argument(node, 3, "dtype") is not None:
        return Miss(layer_of(node), NO_SHAPE)
    dims: Any = argument(node, 1, "dim", ())
    found = {dim % len(shape) for dim in ([dims] if type(dims) is int else dims or ())}
    if len(shape) < 3 or found != set(range(1, len(shape) - 1)) or argument(node, 2, "keepdim", False):
        return Miss(layer_of(node), "the kernel takes means over all that lies between batch and channels")
    return None


def _average(graph_module: GraphModule, node: Node) -> None:
    name = add_module(graph_module, f"average_{node.name}", AverageRows())
    with graph_module.graph.inserting_before(node):
        averaged = graph_module.graph.call_module(name, (input_of(node),))
    averaged.meta["tensor_meta"] = node.meta["tensor_meta"]
    node.replace_all_uses_with(averaged)
    graph_module.graph.erase_node(node)
