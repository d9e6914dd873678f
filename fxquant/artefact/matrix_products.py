"""Products of matrices that are not computed: zeros of the shape and dtype that they would have.

They cost time as well as memory, and a graph from a file may ask for any number of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from fxquant.errors import ArtefactError

Reserve = Callable[[int], None]
"""Is told how many elements a tensor has before it is made, and raises where they are too many."""


def stand_in(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], reserve: Reserve) -> Tensor | None:
    """Zeros in the place of a product of matrices, after `reserve` of their number; None for what has to be run.

    Args:
        name: the name of the function or method.
        args, kwargs: its arguments.
        reserve: is told the number of elements before they are made.

    Raises ArtefactError where the matrices cannot be multiplied.
    """
    if name == "einsum" and not kwargs and len(args) == 3 and type(args[0]) is str and "." not in args[0]:
        return _einsum(args[0], args[1], args[2], reserve)
    if kwargs or not all(isinstance(arg, Tensor) for arg in args if arg is not None):
        return None
    if name in ("matmul", "bmm") and len(args) == 2:
        return product(args[0], args[1], reserve)
    if name == "linear" and len(args) in (2, 3):
        return linear(args[0], args[1], args[2] if len(args) == 3 else None, reserve)
    return None


def product(left: Tensor, right: Tensor, reserve: Reserve) -> Tensor:
    """Zeros of the shape of left @ right. Raises ArtefactError where they cannot be multiplied.

    Args:
        left, right: the operands of a matrix product.
        reserve: is told how many elements the result has before it is made, and may refuse.
    """
    if min(left.ndim, right.ndim) < 2:
        if left.ndim == right.ndim == 1 and len(left) == len(right) and left.dtype == right.dtype:
            return left.new_zeros(())
        raise ArtefactError(f"shapes {tuple(left.shape)} and {tuple(right.shape)} cannot be multiplied")
    if left.shape[-1] != right.shape[-2] or left.dtype != right.dtype:
        raise ArtefactError(f"{left.dtype} {tuple(left.shape)} times {right.dtype} {tuple(right.shape)} has no value")
    try:
        batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    except ValueError as error:
        raise ArtefactError(f"{tuple(left.shape)} times {tuple(right.shape)} has no value: {error}") from error
    reserve(math.prod(batch) * max(left.shape[-2] * left.shape[-1], right.shape[-2] * right.shape[-1]))
    shape = (*batch, left.shape[-2], right.shape[-1])
    reserve(math.prod(shape))
    return left.new_zeros(shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, reserve: Reserve) -> Tensor:
    """Zeros of the shape of x W^T + b. Raises ArtefactError where they do not fit.

    Args:
        x: the input of the layer, float (..., in).
        weight: the layer's weight, float (out, in).
        bias: the layer's bias, float (out,), or None.
        reserve: is told how many elements the result has before it is made, and may refuse.
    """
    dtypes = {x.dtype, weight.dtype, *([] if bias is None else [bias.dtype])}
    fits = weight.ndim == 2 and x.ndim > 0 and x.shape[-1] == weight.shape[1] and x.is_floating_point()
    if not fits or len(dtypes) > 1 or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
        raise ArtefactError(
            f"a linear layer of {weight.dtype} {tuple(weight.shape)} does not take {x.dtype} {tuple(x.shape)}"
        )
    shape = (*x.shape[:-1], weight.shape[0])
    reserve(math.prod(shape))
    return x.new_zeros(shape)


def _einsum(equation: str, left: Tensor, right: Tensor, reserve: Reserve) -> Tensor:
    """Zeros of the shape of a product over named axes. Raises ArtefactError where sizes do not fit."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    known: dict[str, int] = {}
    pairs = [
        pair
        for axes, tensor in zip(names, (left, right), strict=False)
        for pair in zip(axes, tensor.shape, strict=False)
    ]
    fits = len(names) == 2 and all(len(axes) == t.ndim for axes, t in zip(names, (left, right), strict=True))
    fits = fits and all(known.setdefault(axis, size) == size for axis, size in pairs) and left.dtype == right.dtype
    if not fits or not arrow or not set(output) <= known.keys() or len(set(output)) != len(output):
        raise ArtefactError(f"einsum {equation!r} does not take {tuple(left.shape)} and {tuple(right.shape)}")
    shape = [known[axis] for axis in output]
    reserve(math.prod(shape))
    return left.new_zeros(shape)
