"""Models quantized by hand: every kind of quantizer in its place, scales guessed."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.graph.annotation import Role, annotate
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import QUANTIZED, ROLES_ASSIGNED, declare
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedInput, QuantizedLinear, QuantizedMatmul
from tests.operands import operands


def quantize_by_hand(
    model: nn.Module, image_shape: tuple[int, int, int], bits: int, activation_bits: int
) -> GraphModule:
    """Trace the model and put quantizers of every kind into it; scales are guesses, the arithmetic is real."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02
    graph_module = trace(model, torch.rand(2, *image_shape))
    low = activation_bits
    for node in list(graph_module.graph.nodes):
        if node.target is torch.matmul:
            graph_module.add_submodule(
                node.name, QuantizedMatmul(Log2Quantizer(low, 1.0), UniformQuantizer(low, 0.1, 3))
            )
            node.op, node.target = "call_module", node.name
            annotate(node, role=Role.QK, layer=node.name, macs=7, operands=operands(low, low, weight=False))
        elif node.op == "call_module":
            module = graph_module.get_submodule(node.target)
            replacement = quantized_module(module, bits, low)
            if replacement is not None:
                graph_module.add_submodule(node.target, replacement)
                has_weight = isinstance(replacement, QuantizedLinear | QuantizedConv2d)
                found = operands(bits, low) if has_weight else operands(low, weight=False)
                annotate(node, role=Role.QKV, layer=node.target, block=0, operands=found)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    declare(graph_module, frozenset({ROLES_ASSIGNED, QUANTIZED}))
    return graph_module


def quantized_module(module: nn.Module, bits: int, activation_bits: int) -> nn.Module | None:
    if isinstance(module, nn.Softmax | nn.LayerNorm):
        return QuantizedInput(module, ShiftedRegionsQuantizer(activation_bits, 0.02, 1, 3))
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return None
    weight_quantizer = UniformQuantizer(bits, module.weight.flatten(1).abs().amax(1, keepdim=True) / (2 ** (bits - 1)))
    arguments = (module.weight, module.bias, weight_quantizer, UniformQuantizer(activation_bits, 0.05))
    if isinstance(module, nn.Linear):
        return QuantizedLinear(*arguments)
    keys = ("stride", "padding", "dilation", "groups")
    return QuantizedConv2d(*arguments, {key: getattr(module, key) for key in keys})


class SmallNet(nn.Module):
    """A convolution, a constant, an attention, a norm, a float layer: every kind of thing a file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.softmax = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.Softmax(-1)
        self.fc, self.act, self.head = nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)
        self.position = nn.Parameter(torch.rand(4, 6))

    def forward(self, image):
        x = self.embed(image).flatten(2).transpose(1, 2) + self.position
        x = self.softmax(x @ x.transpose(1, 2)) @ self.norm(x)
        return self.head(self.act(self.fc(x)).mean(dim=1))
