"""AssembleTokens: the tokens of a Vision Transformer in one step: class tokens in front, positions added.

    cat(class, x) + positions,    cat(class, x + positions),    x + positions

Each becomes one node, with the same sums. A constant that is added to tokens but is not one row for each of them is a
miss: the sum stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.facts import Fact
from fxquant.graph.names import add_module
from fxquant.graph.nodes import argument, constant_of, only_reader
from fxquant.runtime.integer import lowered
from passes.lower.integer_plan import SUMS, layer_of, shape_of
from passes.lower.rewrite import REQUIRES, Miss, note_misses
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class AssembleTokens:
    """Replace what matches."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Replace in place; returns how many sums there were."""
        misses, replaced = [], 0
        for node in list(graph_module.graph.nodes):
            found = _assembled(graph_module, node)
            if isinstance(found, Miss):
                misses.append(found)
            if not isinstance(found, tuple):
                continue
            source, positions, first = found
            name = add_module(graph_module, f"tokens_{node.name}", lowered.AssembleTokens(positions, first))
            with graph_module.graph.inserting_before(node):
                assembled = graph_module.graph.call_module(name, (source,))
            assembled.meta["tensor_meta"] = node.meta["tensor_meta"]
            node.replace_all_uses_with(assembled)
            graph_module.graph.eliminate_dead_code()
            replaced += 1
        note_misses(context, self, misses)
        return replaced


def _assembled(graph_module: GraphModule, node: Node) -> tuple[Node, Tensor, Tensor] | Miss | None:
    """The tokens (B, N, C) that a node adds something to, their positions (N, C) and what is in front (n, C)."""
    if not node.users:
        return None
    added = _with_positions(graph_module, node)
    if isinstance(added, Miss):
        return added
    if added is not None:
        source, positions = added
        joined = _joined(graph_module, source) if only_reader(source) is node else None
        if joined is None:
            is_input = only_reader(node) is not None and _joined(graph_module, next(iter(node.users))) is not None
            return None if is_input else (source, positions, positions[:0])
        front = len(joined[1])
        return joined[0], positions[front:], joined[1] + positions[:front]
    joined = _joined(graph_module, node)
    if joined is None or only_reader(joined[0]) is not node:
        return None
    added = _with_positions(graph_module, joined[0])
    return (*added, joined[1]) if isinstance(added, tuple) else None


def _with_positions(graph_module: GraphModule, node: Node) -> tuple[Node, Tensor] | Miss | None:
    """x and a constant of x + constant, one float32 row (C,) for each of x's tokens; None for another sum."""
    if node.target not in SUMS or len(node.args) != 2 or node.kwargs or len(shape_of(node) or ()) != 3:
        return None
    source, constant = node.args[0], constant_of(graph_module, node.args[1])
    if constant is None or not isinstance(source, Node) or shape_of(source) != shape_of(node):
        return None
    if tuple(constant.shape) == (1, *(shape_of(node) or ())[1:]) and constant.dtype == torch.float32:
        return source, constant[0]
    return Miss(layer_of(node), "the constant that it adds is not one row of float32 for each token")


def _joined(graph_module: GraphModule, node: Node) -> tuple[Node, Tensor] | None:
    """x and what stands before it, (n, C), of cat((constants that are expanded to the batch..., x), 1)."""
    parts = node.args[0] if node.target is torch.cat else None
    if not isinstance(parts, list | tuple) or len(parts) < 2 or argument(node, 1, "dim", 0) != 1:
        return None
    if len(shape_of(parts[-1]) or ()) != 3:
        return None
    constants = []
    for part in parts[:-1]:
        expanded = isinstance(part, Node) and part.target == "expand"
        constant = constant_of(graph_module, part.args[0]) if expanded else None
        if constant is None or constant.ndim != 3 or len(constant) != 1 or constant.dtype != torch.float32:
            return None
        if shape_of(part) is None or shape_of(part)[1:] != tuple(constant.shape[1:]):  # type: ignore[index]
            return None
        constants.append(constant[0])
    source = parts[-1]
    return (source, torch.cat(constants)) if isinstance(source, Node) else None
