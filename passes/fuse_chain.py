"""Fuse runs of lowered layers into chains: whole blocks in one call, on a few images at a time, in the cache.

Layers are layer norms that give codes, linear layers and attention on (B, N, C). What a graph has between them (views,
rolls, other operations) ends a chain.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fxquant.runtime.chain import ChainLayer, IntegerChain, Step
from fxquant.runtime.lowered import IntegerAttention, IntegerConv2d, IntegerLinear, LayerNormToCodes
from passes.integer_plan import shape_of

_FEWEST = 2


def fuse_chains(graph_module: GraphModule) -> None:
    """Replace every run of at least two layers that only pass results on to each other."""
    nodes = list(graph_module.graph.nodes)
    position = 0
    while position < len(nodes):
        source, run = _run_from(graph_module, nodes[position:])
        run = _closed(run)
        if source is None or len(run) < _FEWEST:
            position += 1
            continue
        _replace(graph_module, source, run)
        position = nodes.index(run[-1]) + 1


def _layer(graph_module: GraphModule, node: Node) -> ChainLayer | None:
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    is_layer = isinstance(module, LayerNormToCodes | IntegerLinear | IntegerAttention)
    if not is_layer or isinstance(module, IntegerConv2d) or len(shape_of(node) or ()) != 3:
        return None
    return module  # type: ignore[return-value]


def _run_from(graph_module: GraphModule, nodes: list[Node]) -> tuple[Node | None, list[Node]]:
    """The input and the layers of the longest run that begins with the first of these nodes, a layer norm."""
    first = nodes[0]
    if not isinstance(_layer(graph_module, first), LayerNormToCodes):
        return None, []
    source, run = first.all_input_nodes[0], [first]
    shape = shape_of(source)
    if shape is None or len(shape) != 3:
        return None, []
    for node in nodes[1:]:
        known = {source, *run}
        if _layer(graph_module, node) is not None and known.issuperset(node.all_input_nodes):
            if (shape_of(node) or ())[:2] != shape[:2]:
                break
            run.append(node)
    return source, run


def _closed(run: list[Node]) -> list[Node]:
    """The longest beginning of which nobody outside reads anything but the last result."""
    for length in range(len(run), 0, -1):
        inside = set(run[:length])
        if all(inside.issuperset(node.users) for node in run[: length - 1]):
            return run[:length]
    return []


def _replace(graph_module: GraphModule, source: Node, run: list[Node]) -> None:
    number = {source: 0} | {node: index + 1 for index, node in enumerate(run)}
    steps = []
    for node in run:
        layer = _layer(graph_module, node)
        assert layer is not None  # `_run_from` chose it
        steps.append(Step(layer, *(number[read] for read in node.all_input_nodes)))
    channels, width = ((shape_of(node) or (0,))[-1] for node in (source, run[-1]))
    name = f"chain_{run[0].name}"
    graph_module.add_submodule(name, IntegerChain(steps, channels, width))
    last = run[-1]
    with graph_module.graph.inserting_before(last):
        chain = graph_module.graph.call_module(name, (source,))
    chain.meta["tensor_meta"] = last.meta["tensor_meta"]
    last.replace_all_uses_with(chain)
    for node in reversed(run):
        graph_module.graph.erase_node(node)
