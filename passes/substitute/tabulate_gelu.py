"""TabulateGelu: let GELU compute on 14-bit codes, so that kernels look up GELU and the next quantizer in one table.

What follows GELU is a quantizer of few levels, whose code no longer changes below some x and above another. Between the
two the input is rounded to 16,384 points: far finer than the result, which keeps its accuracy. Any quantizer after
GELU is then as cheap as any other; see `fxquant.runtime.integer.byte_table`. Without such kernels nothing is gained.

Deliberately not done: other activation functions; GELUs that several layers read; quantizers of so many levels (8 bits,
mostly) that the table would have to be large: GELU itself is as fast.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.graph.annotation import Role, nodes_with_role
from fxquant.graph.facts import QUANTIZED, Fact
from fxquant.graph.names import exchange_module
from fxquant.graph.nodes import device_of, input_of, only_reader
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_table import BITS, fits
from fxquant.runtime.simulated import QuantizedInput, QuantizedLinear
from passes.pipeline.contract import PassContext

LOWEST = -12.0  # GELU is zero in float32 below
BEYOND = 0.25  # x is above GELU(x) by at most 0.17 where it is positive
POINTS = 1 << 20


@dataclass(frozen=True)
class TabulateGelu:
    """Quantize the input of GELUs between two quantized linear layers to 14 bits."""

    requires: ClassVar[frozenset[Fact]] = frozenset({QUANTIZED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Replace GELU modules in place; returns how many."""
        modules = dict(graph_module.named_modules())
        changed = 0
        for node in nodes_with_role(graph_module, Role.GELU):
            before, after = input_of(node), only_reader(node)
            is_fed = isinstance(modules.get(str(getattr(before, "target", None))), QuantizedLinear)
            gelu, linear = modules.get(str(node.target)), modules.get(str(getattr(after, "target", None)))
            following = linear.input_quantizer if isinstance(linear, QuantizedLinear) else None
            is_alone = only_reader(before) is node
            if not isinstance(gelu, nn.GELU) or following is None or not (is_alone and is_fed):
                continue
            if getattr(following, "scale", torch.ones(1)).numel() != 1:
                continue
            following = copy.deepcopy(following).cpu()  # so that the table is the same for every device
            quantizer = input_quantizer(gelu, following)
            x = quantizer.dequantize(torch.arange(2**BITS, dtype=torch.int32))
            if fits(following.quantize(gelu(x))):
                exchange_module(graph_module, node, QuantizedInput(gelu, quantizer.to(device_of(graph_module))))
                changed += 1
        graph_module.recompile()
        return changed


def input_quantizer(gelu: nn.GELU, following: Quantizer) -> UniformQuantizer:
    """Points over the x for which the code of GELU(x) is neither that of the smallest nor that of the largest x."""
    top = float(following(torch.tensor([1e30])))
    x = torch.linspace(LOWEST, max(top, 0.0) + BEYOND, POINTS)
    codes = following.quantize(gelu(x))
    low = float(torch.where(codes != codes[0], x, 0.0).min())
    high = float(torch.where(codes != codes[-1], x, 0.0).max())
    scale = max(high - low, 1e-6) / (2**BITS - 3)  # one point beyond at either side
    return UniformQuantizer(BITS, scale, round(-low / scale) + 1)
