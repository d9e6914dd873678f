"""The residual stream: tensors of one width tied together by additions, what writes them and what reads them.

From the input of a LayerNorm the search follows additions, token concatenations and data movement, in both directions,
until it meets what writes (linear layers, convolutions without groups, parameters such as class token and position
embedding, each perhaps times a LayerScale vector) and what reads: LayerNorms, and linear layers and convolutions
without groups that have no norm before them, as in the neck of SAM's encoder. Anything else that touches the stream is
a reason why it cannot be changed as a whole.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.nodes import moves_data, reads_shape

ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, torch.cat, torch.concat})
_PRODUCTS = frozenset({operator.mul, torch.mul})


@dataclass
class ResidualStream:
    """One stream. Lists of nodes in no order.

    Args:
        norms: LayerNorms that read it.
        layers: linear nodes and convolutions without groups that write it.
        parameters: get_attr nodes that are added or concatenated.
        readers: linear nodes and convolutions without groups that read it as it is.
        layer_scales: (product node, its vector's get_attr node, the linear node scaled).
        refusals: why it cannot be changed as a whole; empty when it can.
    """

    norms: list[Node] = field(default_factory=list)
    layers: list[Node] = field(default_factory=list)
    parameters: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    layer_scales: list[tuple[Node, Node, Node]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def residual_streams(graph_module: GraphModule) -> list[ResidualStream]:
    """All streams that a LayerNorm over the last dimension reads, in graph order."""
    modules = dict(graph_module.named_modules())
    streams, seen = [], set[Node]()
    for node in graph_module.graph.nodes:
        if _is_norm(node, modules) and node not in seen:
            stream = _Search(modules).run(node.all_input_nodes[0])
            seen.update(stream.norms)
            streams.append(stream)
    return streams


class _Search:
    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules, self.stream = modules, ResidualStream()
        self.seen: set[Node] = set()
        self.pending: list[Node] = []

    def run(self, start: Node) -> ResidualStream:
        """Visit every tensor of the stream that holds `start`."""
        self._add(start)
        while self.pending:
            node = self.pending.pop()
            self._look_back(node)
            for user in node.users:
                self._look_ahead(user)
        for node in self.stream.readers:
            if node in self.stream.layers:  # x + convolution(x)
                self.stream.refusals.append(f"{node.name} ({node.op}) both reads and writes the residual stream")
        return self.stream

    def _add(self, node: Node) -> None:
        if node not in self.seen:
            self.seen.add(node)
            self.pending.append(node)

    def _look_back(self, node: Node) -> None:
        """What a tensor of the stream is made of."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if _is_layer(module):
            self.stream.layers.append(node)
        elif isinstance(module, nn.Conv2d):
            # An output channel of one group that is mixed with those of others would need the others' inputs.
            self.stream.refusals.append(f"{node.name} writes the residual stream in {module.groups} groups of channels")
        elif node.op == "get_attr":
            self.stream.parameters.append(node)
        elif node.op == "call_function" and node.target in ADDITIONS:
            for source in node.all_input_nodes:
                self._add(source)
        elif node.op == "call_function" and node.target in _PRODUCTS and (scaled := self._layer_scale(node)):
            self.stream.layer_scales.append((node, *scaled))
        elif moves_data(node):
            self._add(node.all_input_nodes[0])
        else:
            self.stream.refusals.append(f"{node.name} ({node.op}) writes the residual stream and is no linear layer")

    def _layer_scale(self, node: Node) -> tuple[Node, Node] | None:
        sources = node.all_input_nodes
        vectors = [source for source in sources if source.op == "get_attr"]
        layers = [s for s in sources if s.op == "call_module" and isinstance(self.modules[str(s.target)], nn.Linear)]
        if len(sources) == 2 and vectors and layers and len(layers[0].users) == 1:
            return vectors[0], layers[0]
        return None

    def _look_ahead(self, user: Node) -> None:
        """Who reads a tensor of the stream."""
        if _is_norm(user, self.modules):
            if user not in self.stream.norms:
                self.stream.norms.append(user)
        elif (user.op == "call_function" and user.target in ADDITIONS) or moves_data(user):
            self._add(user)
        elif user.op == "call_module" and _is_layer(self.modules.get(str(user.target))):
            if user not in self.stream.readers:
                self.stream.readers.append(user)
        elif not reads_shape(user):
            self.stream.refusals.append(f"{user.name} ({user.op}) reads the residual stream and is no LayerNorm")


def _is_layer(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _is_norm(node: Node, modules: dict[str, nn.Module]) -> bool:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
