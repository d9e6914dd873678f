"""How large the result of a listed operation can be, from its arguments alone, before anything is computed.

Most operations give no more elements than their tensors, broadcast, have. Those that can blow up have a rule here;
products of matrices, which cost time too, are not computed at all (`matrix_products`). What is in no table is run on
torch's meta device first.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.artefact.allowlist import FUNCTIONS
from fxquant.errors import ArtefactError

_PLAIN = {call for name, call in FUNCTIONS.items() if name.partition(".")[0] in ("operator", "math", "builtins")}
_DECIDING = {call for name, call in FUNCTIONS.items() if name.startswith("math.")} | {
    builtins.float, builtins.int, builtins.max, builtins.min, operator.not_, operator.contains, torch._assert,
}  # fmt: skip
_LARGEST_POWER = 64
_MOST_PIECES = 2**16

Arguments = tuple[Any, ...]
Options = dict[str, Any]

_SAME_SIZE = (
    "abs absolute add add_ addcdiv addcmul and_ atan2 bool ceil celu clamp clamp_max clamp_min clip clone "
    "contiguous cos deg2rad detach div div_ double dropout elu eq erf exp exp2 expm1 float floor floor_divide "
    "floordiv fmod ge gelu glu gt half hardsigmoid hardswish hardtanh iadd imul int invert isfinite isub itruediv "
    "le leaky_relu log log10 log1p log2 log_softmax logical_and logical_not logical_or logsigmoid long lt "
    "masked_fill maximum minimum mish mod mul mul_ multiply ne neg normalize not_ or_ pos pow prelu reciprocal "
    "relu relu6 relu_ remainder round rsqrt rsub selu sigmoid sign silu sin sinh softmax softmin softplus "
    "softsign sqrt square sub sub_ tan tanh to truediv type_as where xor layer_norm rms_norm batch_norm "
    "group_norm instance_norm bucketize empty_like full_like ones_like zeros_like flip roll rot90 tril triu "
    "cumsum argsort gather scatter pixel_shuffle pixel_unshuffle acos asin atan cosh cumprod divide erfc fmax "
    "fmin frac hypot isinf isnan logaddexp nan_to_num negative rad2deg sgn subtract true_divide trunc hardshrink "
    "softshrink tanhshrink log_sigmoid channel_shuffle lerp"
)
_REDUCTIONS = (
    "all amax amin any argmax argmin logsumexp max mean min norm prod std sum var var_mean topk avg_pool1d "
    "avg_pool2d max_pool1d max_pool2d cosine_similarity std_mean contains _assert dim size numel len getattr"
)
_VIEWS = (
    "t T diagonal transpose swapaxes swapdims permute movedim narrow select squeeze unsqueeze view view_as reshape "
    "reshape_as flatten unflatten expand expand_as broadcast_to chunk split split_with_sizes unbind"
)
_BROADCAST = frozenset(f"{_SAME_SIZE} {_REDUCTIONS} {_VIEWS}".split())
_PIECES = frozenset({"chunk", "split", "unbind", "split_with_sizes"})


def predicted_elements(name: str, args: Arguments, kwargs: Options) -> int:
    """The most elements that a tensor given by the operation can have. Raises ArtefactError for too many pieces.

    Args:
        name: the name of the function or method.
        args, kwargs: what it is called with.
    """
    if name in _PIECES:
        _check_pieces(name, args, kwargs)
    if name in _BROADCAST:
        return _broadcast(args, kwargs)
    if name in _RULES:
        return _RULES[name](args, kwargs)
    if not any(True for _ in tensors_in((args, kwargs))):
        return 0  # of numbers come numbers
    return _meta_elements(name, args, kwargs)


def check_numbers(function: Callable[..., Any], args: Arguments, kwargs: Options) -> None:
    """Raise ArtefactError for Python's own operations on texts and sequences, and for powers, that could blow up.

    Args:
        function: what is called.
        args, kwargs: what it is called with.
    """
    values = [*args, *kwargs.values()]
    if function in _DECIDING and any(isinstance(value, Tensor) for value in values):
        raise ArtefactError(f"{function.__name__} makes a number of a tensor: what runs must not depend on the images")
    if function not in _PLAIN or function is builtins.getattr:
        return
    if any(isinstance(value, str | dict) for value in values):
        raise ArtefactError(f"{function.__name__} is given a text or a dict: it computes with numbers and tensors")
    if function in (operator.mul, operator.imul) and any(isinstance(value, tuple | list) for value in values):
        raise ArtefactError("a sequence is repeated, which graphs in files may not do")
    is_power = function in (operator.pow, math.pow) and not any(isinstance(value, Tensor) for value in values)
    if is_power and any(abs(value) > _LARGEST_POWER for value in values[1:]):
        raise ArtefactError(f"the exponent of a power is more than {_LARGEST_POWER}")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a value: in tuples, lists, dicts and the ends of slices."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))


def _broadcast(args: Arguments, kwargs: Options) -> int:
    shapes = [tensor.shape for tensor in tensors_in((args, kwargs))]
    try:
        return math.prod(np.broadcast_shapes(*shapes)) if shapes else 0  # torch's own loads its compiler
    except ValueError:  # what does not broadcast gives no more than the largest
        return max(map(math.prod, shapes))


def _check_pieces(name: str, args: Arguments, kwargs: Options) -> None:
    """Raise ArtefactError where a dimension could fall into more tensors than a model needs."""
    tensor, given = args[0], args[1:]
    longest = max(tensor.shape, default=0) if isinstance(tensor, Tensor) else 0
    size = next(iter(given), kwargs.get("split_size_or_sections", kwargs.get("split_size", 1)))
    pieces = -(-longest // max(size, 1)) if name == "split" and type(size) is int else longest
    if pieces > _MOST_PIECES:
        raise ArtefactError(f"{name} could give {pieces} tensors")


def _int(args: Arguments, kwargs: Options, place: int, name: str) -> int:
    found = args[place] if len(args) > place else kwargs.get(name, 0)
    return found if type(found) is int else 0


def _numbers(values: Iterable[Any]) -> Iterator[float]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _numbers(value)
        elif type(value) in (int, float):
            yield abs(value)


def _sized(args: Arguments, kwargs: Options) -> int:
    """Of what is made in a given size: the product of all numbers."""
    given = [*args, *(value for key, value in kwargs.items() if key in ("size", "n", "m", "steps", "repeats", "dims"))]
    return math.prod(max(1, math.ceil(number)) for number in _numbers(given))


def _repeated(args: Arguments, kwargs: Options) -> int:
    return _broadcast(args[:1], {}) * _sized(args[1:], kwargs)


def _repeat_interleave(args: Arguments, kwargs: Options) -> int:
    repeats = args[1] if len(args) > 1 else kwargs["repeats"]
    if type(repeats) is not int:
        raise ArtefactError("repeat_interleave repeats by a tensor: its size must not depend on the images")
    return _broadcast(args[:1], {}) * max(1, repeats)


def _range(args: Arguments, kwargs: Options) -> int:
    """Of `arange`: its ends apart, by steps."""
    start, end, step = [*args, 1][:3] if len(args) > 1 else (0, args[0] if args else kwargs["end"], 1)
    return int(abs((end - start) / float(kwargs.get("step", step) or 1))) + 1


def _padded(args: Arguments, kwargs: Options) -> int:
    tensor, pads = args[0], args[1] if len(args) > 1 else kwargs.get("pad", ())
    grown = [*tensor.shape]
    for place, size in enumerate(pads):
        grown[-1 - place // 2] += max(0, size)
    return math.prod(grown)


def _joined(args: Arguments, kwargs: Options) -> int:
    return sum(tensor.numel() for tensor in tensors_in((args, kwargs)))


def _indexed(args: Arguments, kwargs: Options) -> int:
    """Of x[...]: what is left of x for every element of the indices, where there are any."""
    if not isinstance(args[0], Tensor):
        return 0
    tensor, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    taken = [torch.as_tensor(item) for item in index if isinstance(item, Tensor | list)]
    if not taken:
        return tensor.numel()
    return tensor.numel() // max(1, _indexed_sizes(tensor, index)) * max(1, _broadcast((taken,), {}))


def _indexed_sizes(tensor: Tensor, index: tuple[Any, ...]) -> int:
    """Sizes, multiplied, of the dimensions in whose place an index of many elements stands."""
    widths = [0 if item is None else _width(item) for item in index]
    found, axis = 1, 0
    for item, width in zip(index, widths, strict=True):
        if item is ...:
            axis += tensor.ndim - sum(widths)
        elif isinstance(item, Tensor | list):
            found *= math.prod(tensor.shape[axis : axis + width])
        axis += width
    return found


def _width(item: Any) -> int:
    """Dimensions that one item of an index takes; `...` takes those that are left."""
    return 0 if item is ... else item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _selected(args: Arguments, kwargs: Options) -> int:
    """Of `index_select` and `take`: elements of the index, each of a row."""
    tensors = list(tensors_in((args, kwargs)))
    axis = args[1] if len(args) > 1 and type(args[1]) is int else kwargs.get("dim", 0)
    rows = tensors[0].shape[axis] if type(axis) is int and tensors[0].ndim else 1
    return tensors[0].numel() // max(rows, 1) * tensors[-1].numel()


def _attended(args: Arguments, kwargs: Options) -> int:
    """Of attention: its scores."""
    query, key = args[0], args[1]
    return int(max(query.numel(), math.prod(query.shape[:-1]) * key.shape[-2]))


def _classes(args: Arguments, kwargs: Options) -> int:
    count = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
    if type(count) is not int or count < 1:
        raise ArtefactError("one_hot is not told the number of classes: its size must not depend on the images")
    return int(args[0].numel() * count)


def _pooled(args: Arguments, kwargs: Options) -> int:
    size = args[1] if len(args) > 1 else kwargs["output_size"]
    sizes = [size, size] if type(size) is int else [1 if each is None else each for each in size]
    return int(math.prod(args[0].shape[:-1]) * math.prod(sizes))


def _product_elements(added: Tensor, left: Tensor, right: Tensor) -> int:
    return max(added.numel(), math.prod(left.shape[:-1]) * right.shape[-1])


def _outer(args: Arguments, kwargs: Options) -> int:
    return math.prod(tensor.numel() for tensor in tensors_in((args, kwargs)))


_RULES: dict[str, Callable[[Arguments, Options], int]] = {
    **dict.fromkeys(("zeros", "ones", "full", "eye"), _sized),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "linspace"), lambda args, kwargs: _sized(args[1:], kwargs)),
    "linspace": lambda args, kwargs: _sized(args[2:], kwargs),
    **dict.fromkeys(("repeat", "tile"), _repeated),
    "repeat_interleave": _repeat_interleave,
    "arange": _range,
    "pad": _padded,
    "_pad": _padded,
    **dict.fromkeys(("cat", "concat", "hstack", "stack"), _joined),
    "getitem": _indexed,
    **dict.fromkeys(("index_select", "take"), _selected),
    "scaled_dot_product_attention": _attended,
    "one_hot": _classes,
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d"), _pooled),
    **dict.fromkeys(("outer", "meshgrid"), _outer),
    **dict.fromkeys(
        ("addmm", "baddbmm"), lambda args, kwargs: _broadcast(args[:1], {}) + _product_elements(*args[1:3])
    ),
    "diag": lambda args, kwargs: (args[0].numel() + abs(_int(args, kwargs, 1, "diagonal"))) ** 2,
}


def _meta_elements(name: str, args: Arguments, kwargs: Options) -> int:
    """Elements of the result on the meta device. Raises whatever torch raises."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if isinstance(value, tuple | list):
            return type(value)(map(moved, value))
        return {key: moved(item) for key, item in value.items()} if isinstance(value, dict) else value

    found = next((call for key, call in FUNCTIONS.items() if key.endswith(f".{name}")), None)
    call = found or getattr(Tensor, name)
    return _joined((call(*moved(args), **moved(kwargs)),), {})
