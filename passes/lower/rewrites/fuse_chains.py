"""FuseChains: runs of lowered layers become chains, whole blocks in one call, a few images at a time, in the cache.

Layers are layer norms that give codes, linear layers and attention. A chain sees rows of channels, so views that keep
rows in their order are nothing to it, and where a run begins with a permutation of rows
(`passes.lower.rewrites.order_rows`), the chain reads them so; behind the one that undoes it, no attention follows, and
rows are written back to their places. What else a graph has between layers ends a chain; a layer that is in none is a
miss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fxquant.graph.facts import Fact
from fxquant.graph.names import add_module
from fxquant.graph.nodes import module_of
from fxquant.runtime.integer.chain import ChainLayer, IntegerChain, RowOrder, Step
from fxquant.runtime.integer.lowered import IntegerAttention, IntegerConv2d, IntegerLinear, LayerNormToCodes
from fxquant.runtime.integer.row_order import ReorderRows
from passes.lower.batch_shapes import by_image, copy_batch_values, has_batch_shapes, note_batch_shapes
from passes.lower.integer_plan import layer_of, operation_of, shape_of
from passes.lower.rewrite import REQUIRES, Miss, note_misses
from passes.pipeline.contract import PassContext

_FEWEST = 2
_VIEWS = ("view", "reshape", "flatten", "contiguous")


@dataclass
class _Run:
    """Nodes that a chain can replace.

    source: whose rows the chain reads, in the order of `gather` where there is one. values: the number of what a node
    holds, 0 for the first layer's input. is_back: nodes whose rows are in their old places again.
    """

    source: Node
    gather: Node | None
    values: dict[Node, int]
    nodes: list[Node] = field(default_factory=list)
    layers: list[Node] = field(default_factory=list)
    is_back: set[Node] = field(default_factory=set)

    def upto(self, count: int) -> _Run:
        """The first nodes of it only."""
        nodes = self.nodes[:count]
        layers = [node for node in self.layers if node in nodes]
        return _Run(self.source, self.gather, self.values, nodes, layers, self.is_back)

    def is_closed(self) -> bool:
        """Whether nobody outside reads anything but the last node."""
        inside = set(self.nodes)
        first = [] if self.gather is None else [self.gather]
        return all(inside.issuperset(node.users) for node in (*first, *self.nodes[:-1]))


@dataclass(frozen=True)
class FuseChains:
    """Replace every run of at least two layers that only pass results on to each other."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Fuse in place; returns how many chains there are."""
        nodes = list(graph_module.graph.nodes)
        position = made = 0
        while position < len(nodes):
            run = _longest(graph_module, nodes[position:])
            position += 1
            if run is not None:
                copy_batch_values(_replace(graph_module, run), like=run.nodes[-1])
                position = nodes.index(run.nodes[-1]) + 1
                made += 1
        graph_module.graph.eliminate_dead_code()
        alone = [node for node in graph_module.graph.nodes if _layer(graph_module, node) is not None]
        note_misses(context, self, [_miss(graph_module, node) for node in alone])
        return made


def _miss(graph_module: GraphModule, node: Node) -> Miss:
    """Why a layer is in no chain: none begins with it, or none that began before it came as far."""
    if isinstance(_layer(graph_module, node), LayerNormToCodes):
        readers = ", ".join(sorted({operation_of(graph_module, reader) for reader in node.users}))
        return Miss(layer_of(node), f"no second layer follows that only passes results on: {readers} reads its result")
    sources = ", ".join(sorted({operation_of(graph_module, source) for source in _reads(node)}))
    return Miss(layer_of(node), f"a chain begins with a layer norm that gives codes, and this layer reads {sources}")


def _longest(graph_module: GraphModule, nodes: list[Node]) -> _Run | None:
    """The longest closed run that begins with the first of these nodes, a layer norm or a permutation of its rows."""
    run = _begun(graph_module, nodes[0])
    if run is None:
        return None
    first = nodes[0] if run.gather is not None else run.source
    rows = _rows(first)
    for node in nodes if run.gather is None else nodes[1:]:
        if not _reads(node) or not run.values.keys() >= set(_reads(node)):
            continue
        if _rows(node) != rows or not _joins(graph_module, run, node, shape_of(first) or ()):
            break
    found = (run.upto(count) for count in range(len(run.nodes), 0, -1))
    closed = (part for part in found if part.is_closed() and len(part.layers) >= _FEWEST)
    return next((part for part in closed if _is_plain(part) or _is_by_image(graph_module, part)), None)


def _is_plain(run: _Run) -> bool:
    """Whether what a chain gives has the result's shape."""
    first, result = shape_of(run.gather or run.source) or (), shape_of(run.nodes[-1]) or ()
    return run.gather is None and len(first) == len(result) == 3 and first[:2] == result[:2]


def _is_by_image(graph_module: GraphModule, run: _Run) -> bool:
    """Whether images lie one after the other in what the run reads and gives, so that it can be given that shape."""
    if not has_batch_shapes(graph_module):
        note_batch_shapes(graph_module)
    return None not in (by_image(run.source), by_image(run.nodes[-1]))


def _begun(graph_module: GraphModule, node: Node) -> _Run | None:
    source = next(iter(node.all_input_nodes), None)
    if source is None or shape_of(source) is None:
        return None
    if _reordering(graph_module, node) is not None:
        return _Run(source, node, {node: 0})
    return _Run(source, None, {source: 0}) if isinstance(_layer(graph_module, node), LayerNormToCodes) else None


def _joins(graph_module: GraphModule, run: _Run, node: Node, first: tuple[int, ...]) -> bool:
    """Add a node that reads nothing but the run's values, if it fits. first: shape of the first layer's input."""
    are_back = {source in run.is_back for source in _reads(node)}
    if len(are_back) != 1:
        return False  # a sum of rows in two orders
    is_back = are_back.pop()
    source = _reads(node)[0]
    if _is_layer_for(graph_module, node, first, is_back):
        run.layers.append(node)
        run.values[node] = len(run.layers)
    elif _goes_back(graph_module, run, node, is_back):
        run.values[node], is_back = run.values[source], True
    elif _is_view(node) and run.values[source]:
        run.values[node] = run.values[source]
    else:
        return False
    run.nodes.append(node)
    if is_back:
        run.is_back.add(node)
    return True


def _is_layer_for(graph_module: GraphModule, node: Node, first: tuple[int, ...], is_back: bool) -> bool:
    """Whether a node is a layer that a chain runs; attention, where tokens are together as in the chain's input."""
    layer = _layer(graph_module, node)
    if not isinstance(layer, IntegerAttention):
        return layer is not None
    return len(first) == 3 and (shape_of(node) or ())[1:2] == first[1:2] and not is_back


def _goes_back(graph_module: GraphModule, run: _Run, node: Node, is_back: bool) -> bool:
    """Whether a node puts rows back to where the run has taken them from."""
    there, back = _reordering(graph_module, run.gather), _reordering(graph_module, node)
    return there is not None and back is not None and not is_back and there.undone_by(back)


def _reads(node: Node) -> list[Node]:
    """The nodes whose numbers it reads; what else a view is given are sizes."""
    return node.all_input_nodes[:1] if node.target in _VIEWS else node.all_input_nodes


def _rows(node: Node) -> int:
    shape = shape_of(node) or (0,)
    return torch.Size(shape[:-1]).numel()


def _is_view(node: Node) -> bool:
    """Whether a node has the rows of its input, in their order, in another shape."""
    shapes = [shape_of(node), shape_of(node.args[0])]
    return node.target in _VIEWS and None not in shapes and shapes[0][-1] == shapes[1][-1]  # type: ignore[index]


def _reordering(graph_module: GraphModule, node: Node | None) -> ReorderRows | None:
    module = module_of(graph_module, node)
    return module if isinstance(module, ReorderRows) else None


def _layer(graph_module: GraphModule, node: Node) -> ChainLayer | None:
    module = module_of(graph_module, node)
    is_layer = isinstance(module, LayerNormToCodes | IntegerLinear | IntegerAttention)
    if not is_layer or isinstance(module, IntegerConv2d) or len(shape_of(node) or ()) < 3:
        return None
    return module  # type: ignore[return-value]


def _replace(graph_module: GraphModule, run: _Run) -> Node:
    """Put a chain in the place of a run; returns what gives the result of its last node."""
    steps, has_attention = [], False
    for node in run.layers:
        layer = _layer(graph_module, node)
        assert layer is not None  # it joined as one
        has_attention |= isinstance(layer, IntegerAttention)
        steps.append(Step(layer, *(run.values[read] for read in node.all_input_nodes)))
    first, last = run.gather or run.source, run.nodes[-1]
    channels, result = (shape_of(first) or (0,))[-1], shape_of(last) or (0,)
    gather = None if run.gather is None else _reordering(graph_module, run.gather)
    order = RowOrder(gather, (shape_of(first) or (0, 0))[1] if has_attention else 1, last in run.is_back)
    chain_module = IntegerChain(steps, channels, result[-1], order)
    name = add_module(graph_module, f"chain_{run.layers[0].name}", chain_module)
    with graph_module.graph.inserting_before(last):
        chain = graph_module.graph.call_module(name, (run.source,))
        chain.meta["tensor_meta"] = last.meta["tensor_meta"]
        if not _is_plain(run):
            chain = graph_module.graph.call_method("reshape", (chain, -1, *result[1:]))
            chain.meta["tensor_meta"] = last.meta["tensor_meta"]
    last.replace_all_uses_with(chain)
    for node in reversed(run.nodes if run.gather is None else [run.gather, *run.nodes]):
        graph_module.graph.erase_node(node)
    return chain
