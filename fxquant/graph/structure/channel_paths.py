"""Which linear layers read a LayerNorm's output channel by channel.

Between a LayerNorm and its linear layer may lie any data movement: Swin pads, rolls, reshapes, permutes and cuts
windows; a ViT selects the class token or averages tokens. Instead of reasoning about each operation, a probe whose
value is its channel's index (plus one) flows through them: where it arrives with channel j still at place j, the path
is per-channel; where it arrives as zero, the path has padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxquant.graph.nodes import device_of, moves_data, reads_shape


@dataclass
class ChannelPath:
    """What reads one LayerNorm: linear nodes (per-channel all), whether zeros were padded in, or why it cannot fold.

    Args:
        consumers: linear nodes that read the norm, with its channels as their inputs.
        padded: whether zeros are padded in on the way.
        refusal: why the norm cannot be folded; None where it can.
    """

    consumers: list[Node] = field(default_factory=list)
    padded: bool = False
    refusal: str | None = None


def channel_paths(
    graph_module: GraphModule, example_bchw: Tensor, padded: frozenset[str] = frozenset()
) -> dict[Node, ChannelPath]:
    """For each nn.LayerNorm node, the linear layers that read its output.

    Args:
        graph_module: traced.
        example_bchw: float, at least one image; what linear layers make of it is not computed.
        padded: names of norms behind which zeros are padded in at another image size.
    """
    tracer = _PathTracer(graph_module)
    with torch.no_grad():
        tracer.run(example_bchw[:1].to(device_of(graph_module)))
    for node, path in tracer.paths.items():
        path.padded |= node.name in padded
    return tracer.paths


class ProbeTracer(Interpreter):
    """Runs a graph, keeps every value, and lets probes flow beside them.

    Attributes: modules by path; probes: by node, the node where the probe began and what has become of it.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.modules = dict(graph_module.named_modules())
        self.probes: dict[Node, tuple[Node, Any]] = {}

    def begin(self, node: Node, result: Tensor) -> None:
        """A probe of the node's channels, each with its index plus one, in the shape of its result."""
        index = torch.arange(1.0, result.shape[-1] + 1, device=result.device)
        self.probes[node] = (node, index.expand_as(result).contiguous())

    def again(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """What a node that has run gives where some of its inputs have other values."""
        arguments, keywords = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda source: values[source] if source in values else self.env[source]
        )
        return getattr(self, node.op)(node.target, arguments, keywords)


class _PathTracer(ProbeTracer):
    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.paths: dict[Node, ChannelPath] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Zeros for what a linear layer gives: probes need no more than shapes, and layers take nearly all the time."""
        module = self.modules[str(target)]
        if isinstance(module, nn.Linear) and args:
            return args[0].new_zeros(*args[0].shape[:-1], module.out_features)
        return super().call_module(target, args, kwargs)

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        for source in node.all_input_nodes:
            if source in self.probes:
                self._reach(node, module, source)
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            self.begin(node, result)
            self.paths[node] = ChannelPath()
        return result

    def _reach(self, node: Node, module: nn.Module | None, source: Node) -> None:
        origin, probe = self.probes[source]
        path = self.paths[origin]
        if isinstance(module, nn.Linear):
            index = torch.arange(1.0, probe.shape[-1] + 1, device=probe.device)
            kept = probe.eq(index).reshape(-1, probe.shape[-1])
            zero = probe.eq(0).reshape(-1, probe.shape[-1])
            if probe.shape[-1] != module.in_features or not (kept.all(1) | zero.all(1)).all():
                path.refusal = f"channels are mixed between {origin.name} and {node.name}"
            path.padded |= bool(zero.any())
            path.consumers.append(node)
        elif moves_data(node):
            moved = self.again(node, {source: probe})
            if isinstance(moved, Tensor):
                self.probes[node] = (origin, moved)
        elif not reads_shape(node):
            path.refusal = f"{node.name} ({node.op}) reads {origin.name} and is not a linear layer"
