"""Which output channels of which linear layers meet in the products of queries and keys.

As in `fxquant.graph.structure.channel_paths`, a probe whose value is its channel's index (plus one) flows from each
linear layer through data movement and multiplications by numbers, and is read off where it arrives at the two operands
of q k^T: there a head's channel must have one index for every image and token. Channels that anything else reads too (a
norm, rotary embeddings, relative positions) are told from those that only the product reads.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.annotation import Role, nodes_with_role
from fxquant.graph.nodes import argument, device_of, module_uses, moves_data, reads_shape
from fxquant.graph.structure.channel_paths import ProbeTracer
from fxquant.graph.structure.kind import Kind, kind_of

_PRODUCTS = frozenset({operator.mul, operator.imul, torch.mul})
_QUOTIENTS = frozenset({operator.truediv, torch.div})
_MEANS = frozenset({"mean", torch.mean})
_UNDERFLOW = 1e-30  # smaller probabilities have lost their digits
_PARTS = frozenset({"unbind", "chunk", "split", torch.unbind, torch.chunk, torch.split})


@dataclass(frozen=True)
class QueryKey:
    """One product q k^T.

    Args:
        query, key: linear nodes, perhaps the same.
        heads: for each head the output channels of `query` and of `key` that are multiplied with one another, in this
            order, int64 (D,) each.
        ignores_rows: whether softmax takes away what is added to a whole row of the product, as it does to all keys of
            a query.
    """

    query: Node
    key: Node
    heads: list[tuple[Tensor, Tensor]]
    ignores_rows: bool = False

    def channels(self) -> Iterator[tuple[Node, Tensor]]:
        """Every linear node with the channels of a head that it gives, int64 (D,)."""
        for query, key in self.heads:
            yield self.query, query
            yield self.key, key


@torch.no_grad()
def query_keys(graph_module: GraphModule, example_bchw: Tensor) -> tuple[dict[Node, QueryKey], dict[Node, str]]:
    """By node with role QK: what it multiplies, or why its queries and keys cannot be changed together.

    example_bchw: float, at least one image.
    """
    tracer = _ProductTracer(graph_module)
    tracer.run(example_bchw[:1].to(device_of(graph_module)))
    counts = module_uses(graph_module)
    refused = {node: found for node, found in tracer.found.items() if isinstance(found, str)}
    products = {node: found for node, found in tracer.found.items() if isinstance(found, QueryKey)}
    readers: dict[tuple[Node, int], int] = defaultdict(int)
    for product in products.values():
        for node, channels in product.channels():
            for channel in channels.tolist():
                readers[node, channel] += 1
    for product_node, product in products.items():
        for node, channels in product.channels():
            if counts[str(node.target)] > 1:
                refused[product_node] = f"{node.target} is used {counts[str(node.target)]} times"
            elif any(readers[node, channel] > 1 for channel in channels.tolist()):
                refused[product_node] = f"channels of {node.name} are multiplied several times"
            elif not tracer.elsewhere[node].isdisjoint(channels.tolist()):
                refused[product_node] = f"something else than the product reads channels of {node.name}"
    kept = {node: product for node, product in products.items() if node not in refused}
    return {node: replace(product, ignores_rows=tracer.ignores_rows(node)) for node, product in kept.items()}, refused


class _ProductTracer(ProbeTracer):
    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.traced = graph_module
        self.products = set(nodes_with_role(graph_module, Role.QK))
        self.found: dict[Node, QueryKey | str] = {}
        self.elsewhere: dict[Node, set[int]] = defaultdict(set)  # channels that other nodes read

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node in self.products:
            self.found[node] = self._product(node)
        if not isinstance(self.found.get(node), QueryKey):
            for source in dict.fromkeys(node.all_input_nodes):
                if source in self.probes:
                    self._reach(node, source)
        if node.op == "call_module" and isinstance(self.modules[str(node.target)], nn.Linear):
            self.begin(node, result)
        return result

    def _reach(self, node: Node, source: Node) -> None:
        origin, probe = self.probes[source]
        if _scales(node):
            self.probes[node] = (origin, probe)
        elif _moves(node):
            self.probes[node] = (origin, self.again(node, {source: probe}))
        elif not reads_shape(node):
            parts = probe if isinstance(probe, tuple | list) else [probe]
            self.elsewhere[origin].update(int(index) - 1 for part in parts for index in _values(part))

    def _product(self, node: Node) -> QueryKey | str:
        sources = [source for source in node.args[:2] if isinstance(source, Node) and source in self.probes]
        if len(sources) < 2:
            return "an operand does not come straight from a linear layer"
        (query, left), (key, right) = (self.probes[source] for source in sources)
        first, second = _channels(left), _channels(right.mT)
        if first is None or second is None or first.shape != second.shape:
            return "an operand's channels differ between tokens, or its heads between queries and keys"
        pairs: Tensor = torch.stack([first, second], -2).flatten(0, -3).unique(dim=0)  # type: ignore[no-untyped-call]
        return QueryKey(query, key, [(pair[0], pair[1]) for pair in pairs])

    def ignores_rows(self, product: Node) -> bool:
        """Whether softmax, and nothing else, takes away what is added to whole rows of a product.

        Every image, head and row gets a number of its own, of either sign and as large as scores are.
        """
        scores = self.env[product]
        draw = torch.rand(*scores.shape[:-1], 1, generator=torch.Generator().manual_seed(0)).to(scores)
        changed = {product: scores + (2 * draw - 1) * (1 + 2 * scores.abs().max())}
        for node in self.graph.nodes:
            if node is product or changed.keys().isdisjoint(node.all_input_nodes) or reads_shape(node):
                continue
            if node.op == "output":
                return False
            found = self.again(node, changed)
            if kind_of(self.traced, node) is not Kind.SOFTMAX:
                changed[node] = found
            elif not torch.allclose(found, self.env[node], rtol=1e-2, atol=_UNDERFLOW):
                return False
        return True


def _values(probe: Tensor) -> list[float]:
    """The values of a probe, each once; sorted out of one token where all tokens have the same, as nearly always."""
    rows = torch.atleast_2d(probe).flatten(0, -2)  # type: ignore[no-untyped-call]
    found: list[float] = (rows[:1] if bool((rows == rows[:1]).all()) else rows).unique().tolist()
    return found


def _scales(node: Node) -> bool:
    """Whether a node multiplies a tensor by a number, or divides it."""
    if node.target in _QUOTIENTS:
        return isinstance(argument(node, 1, "other"), int | float) and not node.kwargs.get("rounding_mode")
    values = (*node.args, *node.kwargs.values())
    return node.target in _PRODUCTS and any(isinstance(value, int | float) for value in values)


def _moves(node: Node) -> bool:
    """Whether a node moves values without mixing them."""
    return (moves_data(node) and node.target not in _MEANS) or node.target in _PARTS


def _channels(probe_nd: Tensor) -> Tensor | None:
    """Channel indices int64 (..., D) of a probe (..., tokens, D) that is the same for every token, else None."""
    if probe_nd.ndim < 3:
        return None
    first = probe_nd[..., :1, :]
    return first.squeeze(-2).long() - 1 if bool((probe_nd == first).all() and (first > 0).all()) else None
