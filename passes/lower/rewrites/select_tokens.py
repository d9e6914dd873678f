"""SelectTokens: take the token that a head reads before the layers that treat every token alike, instead of after them.

A Vision Transformer that classifies by one token computes the last block's projection, MLP and norm for all of them and
throws the others away. `x[:, i]` moves up through such layers, to the last attention and the residual stream beside it;
each layer then runs on one token, with the same result, bit for bit.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.facts import Fact
from fxquant.graph.nodes import module_of, only_reader
from fxquant.runtime.integer.lowered import IntegerConv2d, IntegerLinear, LayerNormToCodes, ToCodes
from passes.lower.integer_plan import layer_of, set_shape, shape_of
from passes.lower.rewrite import REQUIRES, Miss, note_misses
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class SelectTokens:
    """Move selections of one token up."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Move in place; returns past how many layers."""
        misses, moved = [], 0
        for node in list(graph_module.graph.nodes):
            token = _selected(node)
            if token is None:
                continue
            first = _match(graph_module, node)
            if isinstance(first, Miss):
                misses.append(first)
                continue
            one = _selection(first, token)
            node.args = (one, (slice(None), 0))
            waiting = [one]
            while waiting:
                selection = waiting.pop()
                found = _match(graph_module, selection) if selection.users else None
                if isinstance(found, Node):
                    waiting += _move_up(graph_module, selection, token)
                    moved += 1
                misses += [found] if isinstance(found, Miss) else []
        note_misses(context, self, misses)
        return moved


def _selected(node: Node) -> int | None:
    """i of x[:, i], x (B, N, C) with N over one; None for all else."""
    shape = shape_of(node.args[0]) if node.target is operator.getitem else None
    if shape is None or len(shape) != 3 or shape[1] == 1:
        return None
    index = node.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None) or type(index[1]) is not int:
        return None
    return index[1] if index[1] >= 0 else None


def _match(graph_module: GraphModule, selection: Node) -> Node | Miss:
    """The layer whose result (B, N, C) only the selection reads, and whose tokens depend on that token alone."""
    layer = selection.args[0]
    assert isinstance(layer, Node)  # a tensor is indexed
    if only_reader(layer) is not selection or len(layer.users) != 1:
        return Miss(layer_of(layer), "other tokens of its result are read too, or somebody asks for its shape")
    shapes = [shape_of(source) for source in layer.all_input_nodes]
    if any(shape is None or len(shape) != 3 or shape[:2] != (shape_of(layer) or ())[:2] for shape in shapes):
        return Miss(layer_of(layer), "it does not read as many tokens as it gives")
    is_sum = layer.target is operator.add and len(shapes) == len(layer.args)
    if is_sum or _treats_tokens_alike(module_of(graph_module, layer)):
        return layer
    return Miss(layer_of(layer), "its tokens may depend on one another, as they do in attention")


def _treats_tokens_alike(module: nn.Module | None) -> bool:
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1
    return isinstance(module, IntegerLinear | LayerNormToCodes | ToCodes) and not isinstance(module, IntegerConv2d)


def _move_up(graph_module: GraphModule, selection: Node, token: int) -> list[Node]:
    """Put selections on the layer's inputs instead of its result; returns them."""
    layer = selection.args[0]
    assert isinstance(layer, Node)
    selection.replace_all_uses_with(layer)
    graph_module.graph.erase_node(selection)
    made = []
    for source in layer.all_input_nodes:
        one = _selection(source, token)
        layer.replace_input_with(source, one)
        for other in [user for user in source.users if user is not one and user.args == one.args]:
            other.replace_all_uses_with(one)
            graph_module.graph.erase_node(other)
        made.append(one)
    _set_tokens(layer, layer)
    return made


def _selection(source: Any, token: int) -> Node:
    """A node x[:, i : i + 1] right after x."""
    with source.graph.inserting_after(source):
        one: Node = source.graph.call_function(operator.getitem, (source, (slice(None), slice(token, token + 1))))
    _set_tokens(one, source)
    return one


def _set_tokens(node: Node, like: Any) -> None:
    """Note that a node holds one token of what another holds."""
    batch, _, channels = like.meta["tensor_meta"].shape
    set_shape(node, (batch, 1, channels), like)
