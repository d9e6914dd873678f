"""Scores of attention in one form, whichever way the model spells them:

    softmax((q c) k^T + bias) v          c a number, bias a constant that is added, perhaps to a view of the scores

Models multiply queries by c, or keys, or both by its root, before or after they are split into heads; or they multiply
or divide the scores. All that is one factor, and it goes to the queries as the product reads them: what is computed
differs by float rounding, and quantizers of queries and keys see the same numbers but for a scale. Keys end with
`transpose(-2, -1)`; a constant is the second of what is added; a constant mask that fills scores is added instead, as
`attention_forms` does it.

Deliberately not done: factors behind a sum, which would scale the bias too, and factors of several elements, such as
one for each head: quantizers of a whole tensor would see heads of other sizes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.capture.attention_forms import HIDDEN
from fxquant.graph.names import free_name
from fxquant.graph.nodes import argument, constant_of, module_of

_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul")
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div")
_SUMS = (operator.add, operator.iadd, torch.add, "add")
_FILLS = ("masked_fill", torch.masked_fill)
_VIEWS = ("view", "reshape", torch.reshape)
_MOVES = (
    *_VIEWS, "permute", "transpose", "contiguous", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "swapaxes",
    "movedim", "clone", torch.permute, torch.transpose, torch.flatten, torch.unsqueeze, torch.squeeze, torch.movedim,
    torch.clone, operator.getitem,
)  # fmt: skip
_HIDES = -1e4  # what is filled with less has a probability of 0


@dataclass
class _Scores:
    """product: of queries and keys. factors: nodes that multiply what comes first by a number, with it."""

    product: Node
    factors: list[tuple[Node, float]] = field(default_factory=list)


def normalize_scores(graph_module: GraphModule) -> None:
    """Write the scores under every softmax in the form described above, in place."""
    for node in list(graph_module.graph.nodes):
        module = module_of(graph_module, node)
        if not isinstance(module, nn.Softmax) or not isinstance(node.args[0], Node):
            continue
        found = _scores_above(graph_module, node.args[0])
        if found is None:
            continue
        query, key = found.product.args[:2]
        assert isinstance(query, Node)  # `_scores_above` has seen both
        assert isinstance(key, Node)
        on_query, on_key = _factors_above(graph_module, query), _factors_above(graph_module, key)
        if found.factors or on_key or not _is_at_the_end(query, on_query):
            _gather(found.product, [*on_query, *on_key, *found.factors])
        _spell_transposed(found.product)


def _scores_above(graph_module: GraphModule, node: Node) -> _Scores | None:
    """The product under a softmax, past factors, sums with constants and views; None where there is none."""
    factors: list[tuple[Node, float]] = []
    while len(node.users) == 1:
        factor = _factor(graph_module, node)
        source = node.args[0] if node.args else None
        if node.target is torch.matmul:
            operands = node.args[:2]
            return _Scores(node, factors) if all(isinstance(operand, Node) for operand in operands) else None
        if factor is not None:
            factors.append((node, factor))
        elif node.target in _FILLS:
            if not _fill_by_sum(graph_module, node):
                return None
            factors = []
            continue
        elif node.target in _SUMS and len(node.args) == 2 and not node.kwargs:
            if constant_of(graph_module, source) is not None:
                node.args = (node.args[1], source)
                source = node.args[0]
            if constant_of(graph_module, node.args[1]) is None:
                return None
            factors = []  # they scale the constant too
        elif node.target not in _VIEWS:
            return None
        if not isinstance(source, Node):
            return None
        node = source
    return None


def _factors_above(graph_module: GraphModule, node: Node) -> list[tuple[Node, float]]:
    """Factors of an operand, that before it has only been moved, for nobody else."""
    factors = []
    while len(node.users) == 1:
        factor = _factor(graph_module, node)
        if factor is not None:
            factors.append((node, factor))
        elif node.target not in _MOVES and _axes(node) is None:
            break
        source = node.args[0]
        if not isinstance(source, Node):
            break
        node = source
    return factors


def _is_at_the_end(query: Node, factors: list[tuple[Node, float]]) -> bool:
    """Whether queries are multiplied by no number, or by one as the last thing before the product."""
    is_last = len(factors) == 1 and factors[0][0] is query and query.target in _PRODUCTS
    return not factors or (is_last and isinstance(query.args[1], float))


def _factor(graph_module: GraphModule, node: Node) -> float | None:
    """c of a node x c, c x or x / (1 / c); None for everything else. A constant may come as a tensor of one element."""
    if len(node.args) != 2 or node.kwargs or node.target not in (*_PRODUCTS, *_QUOTIENTS):
        return None
    left, right = (_number(graph_module, value) for value in node.args)
    if node.target in _PRODUCTS and left is not None and isinstance(node.args[1], Node):
        node.args = (node.args[1], node.args[0])
        return left
    if right is None or not isinstance(node.args[0], Node) or node.args[0].op == "get_attr":
        return None
    if node.target in _PRODUCTS:
        return right
    return 1 / right if right else None


def _number(graph_module: GraphModule, value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    constant = constant_of(graph_module, value)
    is_number = constant is not None and constant.numel() == 1 and constant.is_floating_point() and constant.ndim < 2
    return float(constant) if is_number and constant is not None else None


def _gather(product: Node, factors: Iterable[tuple[Node, float]]) -> None:
    """One factor, of the queries, in the place of several."""
    total = 1.0
    for node, factor in factors:
        total *= factor
        source = node.args[0]
        assert isinstance(source, Node)  # `_factor` has seen it
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
    query = product.args[0]
    if total == 1.0 or not isinstance(query, Node):
        return
    with product.graph.inserting_before(product):
        scaled = product.graph.call_function(operator.mul, (query, total))
    for key in ("nn_module_stack", "stack_trace"):
        if key in product.meta:
            scaled.meta[key] = product.meta[key]
    if (shape := query.meta.get("tensor_meta")) is not None:  # a constant has none
        scaled.meta["tensor_meta"] = shape
    product.update_arg(0, scaled)


def _spell_transposed(product: Node) -> None:
    """Keys by `transpose(-2, -1)` where they are transposed, alone or in one permutation with other dimensions."""
    key = product.args[1]
    axes = _axes(key) if isinstance(key, Node) and len(key.users) == 1 else None
    if axes is None or not isinstance(key, Node):
        return
    *outer, last, other = axes
    source = key.args[0]
    assert isinstance(source, Node)  # it is moved
    order = [*outer, other, last]
    if order != sorted(order):
        with key.graph.inserting_before(key):
            source = key.graph.call_method("permute", (source, *order))
        source.meta.update(key.meta)
        meta = key.meta["tensor_meta"]
        source.meta["tensor_meta"] = meta._replace(shape=torch.Size((*meta.shape[:-2], meta.shape[-1], meta.shape[-2])))
    key.op, key.target, key.args, key.kwargs = "call_method", "transpose", (source, -2, -1), {}


def _axes(node: Node) -> list[int] | None:
    """Which dimension comes where, of a node that permutes all or exchanges the last two; None for all others."""
    meta = node.meta.get("tensor_meta")
    rank = len(meta.shape) if meta is not None else 0
    if rank < 2 or node.kwargs:
        return None
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if node.target is getattr:
        return swapped if node.args[1] == "mT" else None
    order: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    if not all(type(axis) is int for axis in order):
        return None
    axes = [axis % rank for axis in order]
    if node.target in ("transpose", "swapaxes", torch.transpose):
        return swapped if sorted(axes) == [rank - 2, rank - 1] else None
    return axes if node.target in ("permute", torch.permute) and len(axes) == rank else None


def _fill_by_sum(graph_module: GraphModule, node: Node) -> bool:
    """Write scores that a constant mask fills with a large negative number as a sum; False: it is another fill."""
    source, value = node.args[0], argument(node, 2, "value")
    mask = constant_of(graph_module, argument(node, 1, "mask"))
    is_hidden = isinstance(value, int | float) and value <= _HIDES
    if mask is None or mask.dtype != torch.bool or not is_hidden or not isinstance(source, Node):
        return False
    dtype = source.meta["tensor_meta"].dtype
    added: Tensor = torch.where(mask, HIDDEN, 0.0).to(dtype)
    name = free_name(graph_module, "mask")
    graph_module.register_buffer(name, added)
    with node.graph.inserting_before(node):
        constant = node.graph.get_attr(name)
    constant.meta["tensor_meta"] = source.meta["tensor_meta"]._replace(shape=added.shape, stride=added.stride())
    node.op, node.target, node.args, node.kwargs = "call_function", operator.add, (source, constant), {}
    return True
