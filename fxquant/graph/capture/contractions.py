"""Sums of products of two tensors, however they are spelled, as matrix products.

`torch.einsum`, `tensordot`, `inner`, `baddbmm` and `addmm` are written as ordinary torch code that the tracer records
in their place: permute, flatten, `@`, unflatten; or a linear layer, where one of the two is a constant that no axis of
the other is aligned with. Every function returns NotImplemented for what it does not cover (one operand, three,
diagonals, outer products), and then the call stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.nn import functional

Label = str | int
IsConstant = Callable[[Any], bool]


def einsum(is_constant: IsConstant, equation: Any, *operands: Any) -> Any:
    """`torch.einsum` of two operands.

    Args:
        is_constant: tells whether an operand is known during the trace.
        equation: as torch takes it; spaces and an ellipsis are fine.
        operands: two, or a list of two.
    """
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return NotImplemented
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    ranks = [len(operand.shape) for operand in operands]
    widest = max(rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True))
    labels = [_labels(term, rank, widest) for term, rank in zip(terms, ranks, strict=True)]
    if "->" not in equation:
        letters = left.replace(".", "")
        kept = sorted(letter for letter in letters if letter != "," and letters.count(letter) == 1)
        out: list[Label] = [*range(widest), *kept]
    else:
        out = _labels(right, len(right.replace("...", "")) + (widest if "..." in right else 0), widest)
    return contract(is_constant, operands[0], operands[1], labels[0], labels[1], out)


def _labels(term: str, rank: int, widest: int) -> list[Label]:
    """One label for each axis; those of an ellipsis are numbered from the right, so that they align when broadcast."""
    before, dots, after = term.partition("...")
    count = rank - len(before) - len(after) if dots else 0
    return [*before, *range(widest - count, widest), *after]


def tensordot(is_constant: IsConstant, a: Any, b: Any, dims: Any = 2, out: None = None) -> Any:
    """`torch.tensordot`; `is_constant` tells whether an operand is known during the trace.

    Args:
        is_constant: tells whether an operand is known during the trace.
        a, b: tensors.
        dims: how many axes are summed, or the summed axes of each.
        out: None; anything else is refused.
    """
    rank_a, rank_b = len(a.shape), len(b.shape)
    if isinstance(dims, int):
        dims = (range(rank_a - dims, rank_a), range(dims))
    if not isinstance(dims, list | tuple) or len(dims) != 2:
        return NotImplemented
    axes_a, axes_b = ([axis % rank for axis in axes] for axes, rank in zip(dims, (rank_a, rank_b), strict=True))
    labels_a: list[Label] = list(range(rank_a))
    labels_b: list[Label] = list(range(rank_a, rank_a + rank_b))
    for axis_a, axis_b in zip(axes_a, axes_b, strict=True):
        labels_b[axis_b] = labels_a[axis_a]
    kept = [label for label in (*labels_a, *labels_b) if not (label in labels_a and label in labels_b)]
    return contract(is_constant, a, b, labels_a, labels_b, kept)


def inner(is_constant: IsConstant, input: Any, other: Any) -> Any:
    """`torch.inner`, sums over the last axes; `is_constant` tells whether an operand is known during the trace.

    Args:
        is_constant: tells whether an operand is known during the trace.
        input, other: tensors whose last axes have one length, or numbers.
    """
    if len(input.shape) == 0 or len(other.shape) == 0:
        return NotImplemented
    return tensordot(is_constant, input, other, ([-1], [-1]))


def baddbmm(is_constant: IsConstant, input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """`torch.baddbmm` and `torch.addmm`: beta input + alpha batch1 @ batch2.

    Args:
        is_constant: tells whether an operand is known during the trace.
        input: what is added; with beta 0 not even read.
        batch1, batch2: matrices, or batches of them.
        beta, alpha: numbers.
    """
    is_linear = is_constant(batch2) and len(batch2.shape) == 2 and not is_constant(batch1)
    factor = batch1 if alpha == 1 else batch1 * alpha
    if is_linear and is_constant(input) and len(input.shape) == 1:
        return functional.linear(factor, batch2.t(), input * beta if beta else None)
    product = functional.linear(factor, batch2.t()) if is_linear else factor @ batch2
    return product + (input if beta == 1 else input * beta) if beta else product


def contract(
    is_constant: IsConstant,
    a: Any,
    b: Any,
    labels_a: Sequence[Label],
    labels_b: Sequence[Label],
    labels_out: Sequence[Label],
) -> Any:
    """Products of a and b, summed over the labels that the result does not have.

    Args:
        is_constant: tells whether an operand is known during the trace.
        a, b: tensors.
        labels_a, labels_b: one label for each axis of a and of b.
        labels_out: labels of the result's axes.
    """
    summed = [label for label in labels_a if label in labels_b and label not in labels_out]
    shared = [label for label in labels_out if label in labels_a and label in labels_b]
    lone = [label for label in (*labels_a, *labels_b) if label not in labels_out and label not in summed]
    is_plain = all(len(set(labels)) == len(labels) for labels in (labels_a, labels_b, labels_out))
    sizes_a, sizes_b = (dict(zip(labels, x.shape, strict=True)) for labels, x in ((labels_a, a), (labels_b, b)))
    if not summed or lone or not is_plain or any(sizes_a[label] != sizes_b[label] for label in summed):
        return NotImplemented
    rest = [label for label in labels_out if label not in shared]
    may_be_linear = not shared and is_constant(a) != is_constant(b)
    if is_constant(a) if may_be_linear else rest and rest[0] in labels_b:
        a, b, labels_a, labels_b, sizes_a, sizes_b = b, a, labels_b, labels_a, sizes_b, sizes_a
    rows, columns = ([label for label in rest if label in labels] for labels in (labels_a, labels_b))
    a = _merged(_permuted(a, labels_a, [*shared, *rows, *summed]), len(summed))
    if may_be_linear:
        weight = _permuted(b, labels_b, [*columns, *summed])
        width = math.prod(sizes_b[label] for label in columns)
        product = functional.linear(a, weight.reshape(width, math.prod(sizes_b[label] for label in summed)))
    else:
        a = _merged(a, len(rows), 1)
        b = _merged(_merged(_permuted(b, labels_b, [*shared, *summed, *columns]), len(columns)), len(summed), 1)
        product = _split(a @ b, [sizes_a[label] for label in rows], len(shared))
    product = _split(product, [sizes_b[label] for label in columns], len(shared) + len(rows))
    return _permuted(product, [*shared, *rows, *columns], list(labels_out))


def _permuted(x: Any, labels: Sequence[Label], wanted: Sequence[Label]) -> Any:
    """The tensor with its axes in another order; a swap of the last two is spelled transpose, as attention has it."""
    order = [list(labels).index(label) for label in wanted]
    rank = len(order)
    if order == [*range(rank)]:
        return x
    if rank >= 2 and order == [*range(rank - 2), rank - 1, rank - 2]:
        return x.transpose(-2, -1)
    return x.permute(*order)


def _merged(x: Any, count: int, behind: int = 0) -> Any:
    """`count` axes as one: the last ones, or those before the last `behind`."""
    last = len(x.shape) - 1 - behind
    if count == 0:
        return x.unsqueeze(last + 1)
    return x if count == 1 else x.flatten(last - count + 1, last)


def _split(x: Any, sizes: Sequence[Any], axis: int) -> Any:
    """The axis as axes of these sizes; the one that depends on the batch is left to torch."""
    if not sizes:
        return x.squeeze(axis)
    return x if len(sizes) == 1 else x.unflatten(axis, [size if isinstance(size, int) else -1 for size in sizes])
