"""Cutting a graph into blocks that run one after another: patch embedding, transformer blocks, PatchMerging, head.

A cut is a place where exactly one value that depends on the image is still needed. Between two cuts lies a stretch;
stretches of the same transformer block (`Annotation.block`) belong together, so do those of one role outside the
blocks. No names and no classes of a model are looked at. What cannot be cut, because two values stay alive all the way
(two branches that meet at the end), is one block.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx import GraphModule, Node

from fxquant.graph.annotation import annotation_of
from fxquant.graph.nodes import image_of


@dataclass(frozen=True)
class Block:
    """A part of a graph with one value in and one value out, by node names.

    Args:
        name: "block 3", or a role outside the transformer blocks.
        source: the node whose value enters.
        result: the node whose value leaves. Names, so that a block can be extracted from any graph that has these
            nodes.
    """

    name: str
    source: str
    result: str


def cut(graph_module: GraphModule) -> list[Block]:
    """The blocks of a graph with roles, in order; the first starts at the image, the last ends at the output."""
    image = image_of(graph_module)
    groups: list[tuple[str | None, Node]] = []  # label and last node of every block so far
    opening = False  # whether the last group is a norm that waits for the layer it leads to
    for stretch in _stretches(graph_module, image):
        label = _label(stretch)
        if groups and (label == groups[-1][0] or (label is None and (opening or not _has_role(stretch)))):
            groups[-1] = (groups[-1][0], stretch[-1])
        elif groups and opening:
            groups[-1] = (label, stretch[-1])
        else:
            groups.append((label, stretch[-1]))
        opening = groups[-1][0] is None
    names = [label or "rest" for label, _ in groups]
    ends = [node.name for _, node in groups]
    return [Block(*row) for row in zip(names, [image.name, *ends[:-1]], ends, strict=True)]


def extract(graph_module: GraphModule, source: str, result: str) -> GraphModule:
    """A graph module that computes node `result` from the value of node `source`; modules are shared, not copied.

    Args:
        graph_module: the graph that both nodes belong to.
        source: name of the node whose value is given.
        result: name of the node whose value is computed.

    Raises KeyError for a node that does not exist, ValueError where `result` needs another input than `source`.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    return extract_part(graph_module, [nodes[source]], nodes[result])


def remainder(graph_module: GraphModule, source: str) -> GraphModule:
    """A graph module that computes the graph's output, be it one tensor or several, from the value of node `source`.

    Raises KeyError for a node that does not exist, ValueError where the output needs more than `source`.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    return extract_part(graph_module, [nodes[source]], graph_module.graph.output_node().args[0])


def extract_part(graph_module: GraphModule, sources: Sequence[Node], results: Any) -> GraphModule:
    """A graph module that computes nodes from the values of others; modules are shared, not copied.

    Args:
        graph_module: the graph that all of them belong to.
        sources: nodes whose values are given, in the order of the arguments.
        results: the node whose value is computed, or a tuple of nodes.

    Raises ValueError where a result needs another input than these.
    """
    entries = set(sources)
    wanted = list(results) if isinstance(results, tuple | list) else [results]
    needed, stack = set(entries), list(wanted)
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        if node.op == "placeholder":
            raise ValueError(f"{wanted[-1].name} cannot be computed from {sources[0].name} alone: it needs {node.name}")
        needed.add(node)
        stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[Node, Node] = {entry: graph.placeholder(entry.name) for entry in sources}
    for node in graph_module.graph.nodes:
        if node in needed and node not in entries:
            copies[node] = graph.node_copy(node, lambda original: copies[original])
    graph.output(tuple(copies[node] for node in wanted) if isinstance(results, tuple | list) else copies[results])
    return GraphModule(graph_module, graph)


def with_outputs(graph_module: GraphModule, names: list[str]) -> GraphModule:
    """A graph module that also returns these nodes' values, after its output; modules are shared, not copied."""
    graph = copy.deepcopy(graph_module.graph)
    nodes = {node.name: node for node in graph.nodes}
    end = next(node for node in graph.nodes if node.op == "output")
    end.args = ((end.args[0], *(nodes[name] for name in names)),)
    return GraphModule(graph_module, graph)


def _stretches(graph_module: GraphModule, image: Node) -> list[list[Node]]:
    """Nodes that depend on the image, split at every cut."""
    dependent = {image}
    for node in graph_module.graph.nodes:
        if node.op != "output" and any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    order = [node for node in graph_module.graph.nodes if node in dependent]
    position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in order}
    stretches: list[list[Node]] = [[]]
    alive: set[Node] = set()
    for node in order:
        stretches[-1].append(node)
        alive = {other for other in alive if last_use[other] > position[node]} | ({node} if node.users else set())
        if node is not image and alive == {node} and _is_batched(node, image):
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _is_batched(node: Node, image: Node) -> bool:
    """Whether the value is a tensor whose first dimension is the image's."""
    meta = node.meta.get("tensor_meta")
    shape: Sequence[int] = getattr(meta, "shape", ())
    return len(shape) > 1 and shape[0] == image.meta["tensor_meta"].shape[0]


def _label(stretch: list[Node]) -> str | None:
    blocks = sorted({b for node in stretch if (b := annotation_of(node).block) is not None})
    if blocks:
        return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"
    return next((str(role) for node in stretch if (role := annotation_of(node).role) and role.has_weight), None)


def _has_role(stretch: list[Node]) -> bool:
    return any(annotation_of(node).role is not None for node in stretch)
