"""What each node does in a Vision Transformer, told by how nodes are connected, never by what they are called.

Attention is anchored at its softmax: the matmul that feeds it is QK^T, the matmul it feeds is AV, linears before the
three operands are qkv (one for all, or one each), the first linear after AV is proj. An MLP is anchored at its
activation: linears before it, and before the gate it is multiplied with, are fc1, the first linear after it is fc2.
Walks follow tensors only (never shapes), pass over views, norms, scales, masks, rotary embeddings, talking heads and
depthwise convolutions, and end at the next layer; a walk never crosses a residual sum and then a norm. A match that
fails says why and at which node.

A layer norm has the role LAYER_NORM when its output goes to a linear or is the final norm; query and key norms (they
go to a matmul) and norms after a block (they go to a residual sum) have none: nothing can be folded out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

from fxquant.graph.structure.kind import Kind, kind_of, tensor_inputs

_LAYERS = frozenset({Kind.LINEAR, Kind.CONV})
_ENDS = _LAYERS | {Kind.FLOAT_CONV, Kind.MATMUL, Kind.SOFTMAX, Kind.IMAGE, Kind.OUTPUT}


@dataclass(frozen=True)
class Failure:
    """A pattern that does not hold: at which node, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Attention:
    """One attention: names of its nodes; qk is None where the weights come straight from a linear (VOLO).

    Args:
        softmax: the softmax over the scores.
        qk: the product of queries and keys; None where the weights come straight from a linear.
        av: the product of the attention probabilities with the values.
        qkv: the linear layers that give queries, keys and values.
        proj: the linear layers that read the result.
        mixers: the layers between softmax and a product that mix heads (talking heads): linear ones, 1x1 convolutions.
    """

    softmax: str
    qk: str | None
    av: str
    qkv: tuple[str, ...]
    proj: tuple[str, ...]
    mixers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mlp:
    """One MLP: names of its nodes; two linears in fc1 where a gate has its own.

    Args:
        activation: the activation function, GELU in a ViT.
        fc1: the linear layers before it; two where a gate has its own.
        fc2: the linear layers that read its result.
    """

    activation: str
    fc1: tuple[str, ...]
    fc2: tuple[str, ...]


def to_networkx(graph_module: fx.GraphModule) -> nx.DiGraph[str]:
    """The graph's tensor flow: one node per fx node that holds tensors, keyed by name, edges from input to user.

    Node attributes: kind (`Kind`), node (the fx node), position (index in graph order). Nodes that hold shapes or
    numbers, and edges into them, are left out.
    """
    graph = nx.DiGraph()
    for position, node in enumerate(graph_module.graph.nodes):
        if "tensor_meta" not in node.meta and node.op != "output":
            continue
        graph.add_node(node.name, kind=kind_of(graph_module, node), node=node, position=position)
        graph.add_edges_from((source.name, node.name) for source in tensor_inputs(node) if source.name in graph)
    return graph


@dataclass
class Walk:
    """Where a walk ended: names of layers reached, and of other nodes that stopped it."""

    reached: list[str]
    stopped: list[str]


def walk(
    graph: nx.DiGraph,
    starts: Iterable[str],
    neighbours: Callable[[str], Iterable[str]],
    targets: frozenset[Kind],
    barriers: frozenset[Kind] = frozenset(),
    norm_after_sum: bool = False,
) -> Walk:
    """Walk from `starts` (themselves examined) to the nearest nodes of the target kinds.

    Args:
        graph: the graph as networkx has it.
        starts: names of the nodes to start from.
        neighbours: gives the names of the nodes to go to from a node: its successors or its predecessors.
        targets: kinds that are looked for.
        barriers: kinds that end the walk besides layers, matmuls and softmax.
        norm_after_sum: whether the walk may pass a layer norm once it has crossed a sum of two activations, that is,
            leave the residual branch.
    """
    found = Walk([], [])
    queue = [(name, False) for name in starts]
    seen: set[str] = set()
    while queue:
        name, crossed_sum = queue.pop(0)
        if name in seen:
            continue
        seen.add(name)
        kind = graph.nodes[name]["kind"]
        if kind in targets:
            found.reached.append(name)
        elif kind in _ENDS or kind in barriers or (kind is Kind.LAYER_NORM and crossed_sum and not norm_after_sum):
            found.stopped.append(name)
        else:
            queue += [(other, crossed_sum or kind is Kind.SUM) for other in neighbours(name)]
    return found


def match_attention(graph: nx.DiGraph, softmax: str) -> Attention | Failure:
    """The attention around a softmax node, or why there is none."""
    after, mixers_after = _to_product(graph, softmax, graph.successors)
    if not after.reached:
        return Failure(softmax, f"softmax feeds no matmul (its output goes to {_listed(after.stopped)})")
    av = after.reached[0]
    before, mixers_before = _to_product(graph, softmax, graph.predecessors)
    qk = before.reached[0] if before.reached else None
    if qk == av:
        return Failure(softmax, f"the matmul '{av}' both feeds the softmax and is fed by it")
    operands = [name for name in graph.predecessors(av) if not _descends(graph, softmax, name)]
    factor = graph.nodes[av]["node"].args[0]
    if factor.name in operands and graph.nodes[factor.name]["kind"] is Kind.CONSTANT:
        return Failure(softmax, f"'{av}' multiplies its output from the left by a constant, not by values")
    operands += list(graph.predecessors(qk)) if qk else []
    qkv = _sources(graph, operands)
    if qk is None:
        qkv = sorted({*qkv, *(name for name in before.stopped if graph.nodes[name]["kind"] in _LAYERS)})
    if not qkv:
        return Failure(qk or av, f"no linear before the operands of '{qk or av}'")
    proj = walk(graph, graph.successors(av), graph.successors, _LAYERS)
    factors = [name for name in proj.stopped if graph.nodes[name]["kind"] is Kind.MATMUL]  # q (k^T v), as in CoaT
    if not proj.reached and factors:
        proj = walk(graph, graph.successors(factors[0]), graph.successors, _LAYERS)
    return Attention(softmax, qk, av, tuple(qkv), tuple(proj.reached), (*mixers_before, *mixers_after))


def _sources(graph: nx.DiGraph, operands: Iterable[str]) -> list[str]:
    """Layers before attention operands; a norm that a linear reads too starts the branch, so the walk ends there."""

    def above(name: str) -> Iterable[str]:
        users = {graph.nodes[user]["kind"] for user in graph.successors(name)}
        is_start = graph.nodes[name]["kind"] is Kind.LAYER_NORM and Kind.LINEAR in users
        return () if is_start else graph.predecessors(name)

    return walk(graph, operands, above, _LAYERS).reached


def _to_product(graph: nx.DiGraph, softmax: str, neighbours: Callable[[str], Iterable[str]]) -> tuple[Walk, list[str]]:
    """From a softmax to the nearest product, and the layers in between that mix heads: their outputs are as wide as
    their inputs. Where no product is reached, the walk is the one that stopped at the first layers, without mixers."""
    direct = walk(graph, neighbours(softmax), neighbours, frozenset({Kind.MATMUL}))
    if direct.reached:
        return direct, []
    mixers = [
        name
        for name in direct.stopped
        if graph.nodes[name]["kind"] in _LAYERS and _is_square(graph.nodes[name]["node"])
    ]
    starts = [other for name in mixers for other in neighbours(name)]
    beyond = walk(graph, starts, neighbours, frozenset({Kind.MATMUL}), frozenset({Kind.SUM}))
    return (beyond, mixers) if beyond.reached else (direct, [])


def _is_square(node: fx.Node) -> bool:
    source = next(iter(tensor_inputs(node)))
    return bool(node.meta["tensor_meta"].shape == source.meta["tensor_meta"].shape)


def _descends(graph: nx.DiGraph, ancestor: str, name: str) -> bool:
    return name == ancestor or nx.has_path(graph, ancestor, name)


def match_mlp(graph: nx.DiGraph, activation: str) -> Mlp | Failure:
    """The MLP around an activation node, or why there is none."""
    barrier = frozenset({Kind.SUM})
    before = walk(graph, graph.predecessors(activation), graph.predecessors, _LAYERS, barrier)
    if not before.reached:
        return Failure(activation, f"no linear before the activation (it reads {_listed(before.stopped)})")
    after = walk(graph, graph.successors(activation), graph.successors, _LAYERS, barrier)
    if not after.reached:
        return Failure(activation, f"no linear after the activation (its output goes to {_listed(after.stopped)})")
    fc2 = after.reached[:1]
    fc1 = walk(graph, graph.predecessors(fc2[0]), graph.predecessors, _LAYERS, barrier).reached
    kinds = {graph.nodes[name]["kind"] for name in (*fc1, *fc2)}
    if activation not in nx.ancestors(graph, fc2[0]) or not set(before.reached) <= set(fc1):
        return Failure(activation, f"'{fc2[0]}' is not fed by the activation alone")
    if kinds != {Kind.LINEAR} and not all(_is_expansion(graph, name, fc2[0]) for name in fc1):
        return Failure(activation, f"'{fc1[0]}' and '{fc2[0]}' are convolutions, not 1x1 kernels that expand")
    return Mlp(activation, tuple(fc1), tuple(fc2))


def _is_expansion(graph: nx.DiGraph, first: str, second: str) -> bool:
    """Whether two convolutions are an MLP on every pixel: 1x1, wider inside than outside."""
    weights = [_weight_shape(graph.nodes[name]["node"]) for name in (first, second)]
    is_pointwise = all(set(weight[2:]) <= {1} for weight in weights)
    return is_pointwise and weights[0][0] >= weights[0][1] and weights[1][0] == weights[0][1]


def _weight_shape(node: fx.Node) -> tuple[int, ...]:
    module: Any = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
    return tuple(module.weight.shape)


def match_reduction(graph: nx.DiGraph, linear: str) -> Failure | None:
    """None if the linear merges neighbouring tokens: its input has k >= 2 times fewer, k times wider tokens than what
    it was gathered from (Swin's patch merging); else why it does not."""
    node: fx.Node = graph.nodes[linear]["node"]
    source = next(iter(tensor_inputs(node)))
    shape = source.meta["tensor_meta"].shape
    seen: set[str] = set()
    queue = [source.name]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        kind = graph.nodes[name]["kind"]
        if kind in (Kind.OTHER, Kind.LAYER_NORM):
            queue += graph.predecessors(name)
            continue
        narrow = graph.nodes[name]["node"].meta["tensor_meta"].shape
        width = narrow[1 if kind in (Kind.CONV, Kind.DEPTHWISE, Kind.FLOAT_CONV) else -1]
        is_multiple = width < shape[-1] and shape[-1] % width == 0
        if len(narrow) >= 3 and is_multiple and narrow.numel() // width > shape.numel() // shape[-1]:
            return None
    return Failure(linear, "neither in attention nor in an MLP, and its input is not gathered from narrower tokens")


def first_layers(graph: nx.DiGraph) -> list[str]:
    """The layers that read the image: the patch embedding, or the first layer of a stem."""
    images = [name for name, kind in graph.nodes(data="kind") if kind is Kind.IMAGE]
    depthwise = [s for name in images for s in graph.successors(name) if graph.nodes[s]["kind"] is Kind.DEPTHWISE]
    starts = [other for name in images for other in graph.successors(name)]
    reached = walk(graph, starts, graph.successors, _LAYERS).reached
    # A layer that others lead to as well reads the image beside what they make of it.
    return depthwise or [name for name in reached if not nx.ancestors(graph, name) & set(reached)]


def last_layers(graph: nx.DiGraph, assigned: set[str]) -> list[str]:
    """The layers whose outputs are the model's output: the classifier, both where there are two (distillation).

    assigned: layers that belong to a block; behind a sum they end the block, and the model has no head.
    """
    outputs = [name for name, kind in graph.nodes(data="kind") if kind is Kind.OUTPUT]
    norms = frozenset({Kind.LAYER_NORM})
    direct = walk(graph, _above(graph, outputs), graph.predecessors, _LAYERS, norms | {Kind.SUM}).reached
    summed = walk(graph, _above(graph, outputs), graph.predecessors, _LAYERS, norms).reached
    return direct or [name for name in summed if name not in assigned]


def _above(graph: nx.DiGraph, names: Iterable[str]) -> list[str]:
    return [other for name in names for other in graph.predecessors(name)]


def match_layer_norm(graph: nx.DiGraph, norm: str) -> Failure | None:
    """None if the norm's output goes to a linear or is the final norm, else why not."""
    found = walk(
        graph, graph.successors(norm), graph.successors, _LAYERS | {Kind.OUTPUT}, frozenset({Kind.SUM, Kind.LAYER_NORM})
    )
    if found.reached:
        return None
    return Failure(norm, f"the norm's output goes to {_listed(found.stopped)}, not to a linear")


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:4]) or "nothing"
