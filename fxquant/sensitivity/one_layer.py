"""A graph in which one layer alone is quantized: what its gradients are there, LampQ's Algorithm 1 asks in line 5.

The layer's weight is replaced by its quantized values, and the observer of its input by the quantizer. Gradients with
respect to the layer's weight and output are those of the quantized network; none flows through the quantizer.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.annotation import annotation_of
from fxquant.sensitivity.measured import Bits


class _Given(nn.Module):
    """Quantized values, through which no gradient flows."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """x, float, to the same shape."""
        quantized: Tensor = self.quantizer(x.detach())
        return quantized


def with_layer_quantized(graph_module: GraphModule, node: Node, bits: Bits) -> tuple[GraphModule, Node]:
    """A graph in which one layer alone is quantized, and the layer's node there.

    Args:
        graph_module: with candidates and observers; it is not changed, and shares all other layers.
        node: a linear layer or a convolution.
        bits: of each of its operands; None leaves it float.
    """
    alone = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    its = next(each for each in alone.graph.nodes if each.name == node.name)
    for operand, width in zip(annotation_of(node).operands, bits, strict=True):
        if width is None:
            continue
        quantizer = next(c.quantizer for c in operand.candidates if c.bits == width)
        if operand.argument is not None:
            # The layer's own observer stands before each of its inputs.
            alone.set_submodule(str(its.args[operand.argument].target), _Given(quantizer))
            continue
        module: Any = copy.deepcopy(graph_module.get_submodule(str(node.target)))
        rows = quantizer(module.weight.detach().flatten(1))
        module.weight = nn.Parameter(rows.reshape(module.weight.shape), requires_grad=False)
        alone.set_submodule(str(its.target), module)
    return alone, its
