"""Whether what reads a residual stream without a norm finds its channels where it multiplies them.

As in `channel_paths`, a probe whose value is its channel's index (plus one) flows through the graph: here it begins at
what writes the stream and follows additions and data movement to the layers that read it, SAM's neck for example.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.nodes import device_of, moves_data
from fxquant.graph.structure.channel_paths import ProbeTracer
from fxquant.graph.structure.residual_stream import ADDITIONS, ResidualStream


def mixed_channels(graph_module: GraphModule, stream: ResidualStream, example_bchw: Tensor) -> list[str]:
    """Why layers that read a stream cannot have its channels changed; empty where all of `stream.readers` can.

    Args:
        graph_module: traced.
        stream: of this graph; without readers nothing is run.
        example_bchw: float, at least one image.
    """
    if not stream.readers:
        return []
    tracer = _StreamTracer(graph_module, stream)
    with torch.no_grad():
        tracer.run(example_bchw[:1].to(device_of(graph_module)))
    return tracer.refusals


class _StreamTracer(ProbeTracer):
    def __init__(self, graph_module: GraphModule, stream: ResidualStream) -> None:
        super().__init__(graph_module)
        self.stream, self.refusals = stream, list[str]()
        self.scaled = {product: layer for product, _, layer in stream.layer_scales}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node in self.stream.readers:
            self._check(node)
        elif node in self.stream.layers or node in self.stream.parameters or node in self.scaled.values():
            axis = 1 if isinstance(self.modules.get(str(node.target)), nn.Conv2d) else result.ndim - 1
            self.probes[node] = (node, _indices(result, axis))
        elif node in self.scaled:
            self.probes[node] = self.probes[self.scaled[node]]
        elif any(source in self.probes for source in node.all_input_nodes):
            self._follow(node)
        return result

    def _follow(self, node: Node) -> None:
        """Additions give the mean of what they add, which is every channel's index only where all terms have it."""
        is_addition = node.op == "call_function" and node.target in ADDITIONS
        if not is_addition and not moves_data(node):
            return
        values = {source: self.probes[source][1] for source in node.all_input_nodes if source in self.probes}
        moved = self.again(node, values)
        if isinstance(moved, Tensor):
            is_sum = is_addition and node.target not in (torch.cat, torch.concat)
            self.probes[node] = (node, moved / 2 if is_sum else moved)

    def _check(self, node: Node) -> None:
        source = node.all_input_nodes[0]
        axis = 1 if isinstance(self.modules[str(node.target)], nn.Conv2d) else -1
        probe = self.probes[source][1] if source in self.probes else None
        if probe is None or not torch.equal(probe, _indices(probe, axis)):
            self.refusals.append(f"channels of the residual stream are mixed before {node.name}")


def _indices(values: Tensor, axis: int) -> Tensor:
    """Index plus one along one axis, in the shape of values."""
    index = torch.arange(1.0, values.shape[axis] + 1, device=values.device)
    return index.reshape(-1, *[1] * (values.ndim - 1 - axis % values.ndim)).expand_as(values).contiguous()
