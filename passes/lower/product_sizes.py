"""How large the products are that a kernel multiplies for a layer, by the shapes that tracing has noted."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import GraphModule, Node

from fxquant.graph.nodes import image_of
from fxquant.runtime.simulated import QuantizedConv2d
from passes.lower.integer_plan import shape_of


def matmul_sizes(graph_module: GraphModule, node: Node, batch_size: int) -> tuple[int, int, int, int]:
    """Matrices, rows, inner size and columns of a product of two activations.

    Args:
        graph_module: where the node stands.
        node: a product that kernels run exactly.
        batch_size: for how many images.
    """
    left, right = (_shape(graph_module, source, batch_size) for source in node.all_input_nodes)
    return math.prod(left[:-2]), left[-2], left[-1], right[-1]


def linear_sizes(graph_module: GraphModule, node: Node, module: Any, batch_size: int) -> tuple[int, int, int]:
    """Rows, input channels and output channels of a layer with a weight.

    Args:
        graph_module: where the node stands.
        node: a layer that kernels run exactly.
        module: the quantized module that it calls, or will call.
        batch_size: for how many images.
    """
    out, inner = module.weight_codes.shape[0], module.weight_codes[0].numel()
    if isinstance(module, QuantizedConv2d):
        return math.prod(_shape(graph_module, node, batch_size)) // out, inner, out
    return math.prod(_shape(graph_module, node.all_input_nodes[0], batch_size)[:-1]), inner, out


def _shape(graph_module: GraphModule, node: Node, batch_size: int) -> tuple[int, ...]:
    """A traced shape with `batch_size` images in the place of the traced ones."""
    shape = shape_of(node)
    assert shape is not None  # integer nodes have shapes
    traced = image_of(graph_module).meta["tensor_meta"].shape[0]
    return (shape[0] * batch_size // traced, *shape[1:])
