"""Where numbers come to lie that a graph only moves around: its operations are run, on memory that nobody reads.

Views, permutations and splits of a tensor are strides into its memory. So strides tell which columns of a linear
layer's result an attention reads, whichever way the model splits it, and no spelling has to be known:

    operand[b, h, n, d]  =  result[b, n, columns[h D + d]]

Deliberately not done: what has to be copied to be moved (a reshape across a permutation) is not followed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.graph.nodes import input_of
from passes.lower.integer_plan import moves, shape_of

COUNTS = (2, 3)
"""Sizes of the first dimension that moves are tried with: none of them may be special."""

_PARTS = (
    operator.getitem, "unbind", torch.unbind, "chunk", torch.chunk, "split", torch.split, "select", torch.select,
    "narrow", torch.narrow, "unflatten", "swapaxes", "movedim", torch.movedim, torch.unsqueeze, torch.squeeze,
)  # fmt: skip
_ARITHMETIC = (operator.floordiv, operator.mul, operator.add, operator.sub)


def parts(node: Node) -> bool:
    """Whether a node moves numbers around or picks some of them."""
    return moves(node) or (node.target in _PARTS and input_of(node) is not None) or node.args[1:] == ("mT",)


def run_moves(path: Sequence[Node], x: Any, size_of: Callable[[Node], Any]) -> Any:
    """What the operations do to another tensor of the same shape as the first one's input.

    Args:
        path: operations, each on the result of the one before.
        x: what the first is given.
        size_of: the number, or the shape, that a node among the other arguments holds.
    """
    for node in path:
        function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        arguments, keywords = torch.fx.node.map_arg((node.args[1:], node.kwargs), size_of)
        x = function(x, *arguments, **keywords)
    return x


def size_with(node: Node, noted: int, count: int) -> Any:
    """The number or the shape that a node holds where tensors whose first size is `noted` have `count` instead.

    Args:
        node: a node whose value follows from shapes alone.
        noted: the first size that the graph was noted with.
        count: the first size that takes its place.

    Raises LookupError where it depends on anything but shapes.
    """
    source = input_of(node)
    is_shape = node.target is getattr and node.args[1] == "shape"
    if is_shape or node.target == "size":
        shape = shape_of(source)
        if shape is None or not shape or shape[0] != noted:
            raise LookupError(node.name)
        found = torch.Size((count, *shape[1:]))
        return found if is_shape or len(node.args) == 1 else found[node.args[1]]  # type: ignore[index]
    if node.target is operator.getitem and source is not None and type(node.args[1]) is int:
        return size_with(source, noted, count)[node.args[1]]
    if node.target in _ARITHMETIC:
        values = [size_with(value, noted, count) if isinstance(value, Node) else value for value in node.args]
        return node.target(*values)
    raise LookupError(node.name)


def moved(path: Sequence[Node], start: Tensor, noted: int) -> Tensor | None:
    """What the moves make of a tensor, if that is a view of it; else None.

    Args:
        path: operations, each on the result of the one before.
        start: what the first is given; it is not read.
        noted: the first size of the tensor that the graph notes for it.
    """
    try:
        found = run_moves(path, start, lambda node: size_with(node, noted, len(start)))
    except (LookupError, RuntimeError, TypeError, IndexError):
        return None
    is_view = isinstance(found, Tensor) and found.untyped_storage().data_ptr() == start.untyped_storage().data_ptr()
    return found if is_view else None


def columns_of(
    path: Sequence[Node], result: tuple[int, ...], wanted: tuple[int, ...], is_transposed: bool = False
) -> Tensor | None:
    """Which columns of a result (B, N, C) come to lie where in (B, H, N, D), int64 (H D,); None: they are no columns.

    Args:
        path: moves from the result on.
        result: the shape that the graph notes for it.
        wanted: the shape that the graph notes for the end of the path.
        is_transposed: whether the path ends with (B, H, D, N).
    """
    found = set()
    for count in COUNTS:
        start = torch.empty((count, *result[1:]), dtype=torch.uint8)
        end = moved(path, start, result[0])
        if end is None or tuple(end.shape) != (count, *wanted[1:]):
            return None
        end = end.mT if is_transposed else end
        found.add((end.storage_offset(), end.stride()[1:]))
        if end.stride(0) != start.stride(0) or end.stride(2) != start.stride(1):
            return None
    if len(found) > 1:
        return None
    first, (head, _, step) = found.pop()
    heads, size = wanted[1], wanted[2 if is_transposed else 3]
    columns: Tensor = (torch.arange(heads)[:, None] * head + torch.arange(size) * step + first).flatten()
    return columns if bool((columns < result[-1]).all()) else None
