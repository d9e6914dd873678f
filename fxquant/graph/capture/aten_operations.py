"""What the operations of an exported program are called in torch, so that tracing sees what a model would have written.

`torch.export` records `aten.linear.default`, `aten.slice.Tensor` and the like. Most are a method of tensors under the
same name with the same arguments; the others are listed here one by one. An operation in neither list is refused by
name: what a list does not say, nobody has compared.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fxquant.errors import TraceError


def names(text: str) -> list[str]:
    """Names with blanks between them, as a list."""
    return text.split()


_METHODS = frozenset(names(
    "abs acos all amax amin any argmax argmin asin atan baddbmm bitwise_and bitwise_not bitwise_or bmm ceil chunk "
    "clamp clamp_max clamp_min copy_ cos cosh cumsum diff div_ erf exp expand expand_as expm1 fill_ flatten flip "
    "floor floor_divide gather index_select isnan log log1p log2 logical_and logical_not logical_or logsumexp "
    "masked_fill masked_fill_ matmul max maximum mean min minimum mm movedim mul_ narrow neg new_full new_ones "
    "new_zeros norm permute prod reciprocal relu remainder repeat repeat_interleave reshape reshape_as roll "
    "round rsqrt scatter select_scatter sigmoid sign sin sinh slice_scatter sort split sqrt square squeeze std sub_ "
    "sum swapaxes t tan tanh tile topk transpose tril triu true_divide type_as unbind unflatten unfold unsqueeze var "
    "zero_ add_ "
))  # fmt: skip
_FUNCTIONS = {
    name: getattr(torch, name)
    for name in names(
        "addmm arange broadcast_to cat concat einsum eye full full_like linspace meshgrid ones ones_like outer "
        "stack tensordot zeros zeros_like "
    )
}
_FUNCTIONALS = {
    name: getattr(functional, name)
    for name in names(
        "adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d elu gelu glu hardsigmoid "
        "hardswish hardtanh leaky_relu log_softmax max_pool1d max_pool2d mish one_hot pad "
        "pixel_shuffle pixel_unshuffle relu6 rms_norm scaled_dot_product_attention selu silu softmax softplus "
    )
}
_OPERATORS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "mul": operator.mul, "neg": operator.neg, "__and__": operator.and_, "__or__": operator.or_,
}  # fmt: skip
_ANYTHING = slice(None)
_FACTORY_OPTIONS = ("layout", "pin_memory", "memory_format")
_MODES = {"upsample_nearest2d": "nearest", "upsample_bilinear2d": "bilinear", "upsample_bicubic2d": "bicubic"}


def torch_operation(target: Any) -> Callable[..., Any]:
    """What computes the same in torch; raises TraceError, naming the target, for what is not listed.

    target: of a call_function node in an exported program.
    """
    if not isinstance(target, torch._ops.OpOverload):
        if target is operator.getitem or (target.__module__ or "") in ("_operator", "torch", "math"):
            return target  # type: ignore[no-any-return]
        raise _unknown(target)
    name, overload = target._opname, target._overloadname
    if target.namespace != "aten":
        raise _unknown(target)
    for table in (_SPECIAL, _OPERATORS, _FUNCTIONALS, _FUNCTIONS):
        if name in table:
            return _without_options(table[name])  # type: ignore[arg-type]
    if name in _MODES and overload == "vec":
        return _upsample(_MODES[name])
    if name not in _METHODS:
        raise _unknown(target)
    return _without_options(lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs))


def _unknown(target: Any) -> TraceError:
    return TraceError(
        f"the exported program calls {target}, which is not among the operations that are read from one: see "
        f"fxquant/graph/capture/aten_operations.py, or give the program as it was before run_decompositions(), or the "
        f"nn.Module that was exported"
    )


def _without_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without arguments of memory, which say nothing of values."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{key: value for key, value in kwargs.items() if key not in _FACTORY_OPTIONS})

    return call


def _sum(tensor: Any, other: Any, alpha: float = 1) -> Any:
    return tensor + (other if alpha == 1 else alpha * other)


def _difference(tensor: Any, other: Any, alpha: float = 1) -> Any:
    return tensor - (other if alpha == 1 else alpha * other)


def _dropout(tensor: Any, p: float, train: bool) -> Any:
    if train and p:
        raise TraceError("the exported program drops values at random: export model.eval()")
    return tensor


def _slice(tensor: Any, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    end = None if isinstance(end, int) and end >= 2**31 else end
    if start in (None, 0) and end is None and step == 1:
        return tensor
    return tensor[(_ANYTHING,) * (axis % len(tensor.shape)) + (slice(start, end, None if step == 1 else step),)]


def _select(tensor: Any, axis: int, index: int) -> Any:
    return tensor[(_ANYTHING,) * (axis % len(tensor.shape)) + (index,)]


def _convolution(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, *rest: Any
    ) -> Any:
        sizes = [tuple(value) if isinstance(value, list) else value for value in (stride, padding, dilation)]
        return function(x, weight, bias, *sizes, *rest)

    return call


def _layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any) -> Any:
    return functional.layer_norm(x, tuple(shape), weight, bias, eps)


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, _: Any, eps: float, *rest: Any
) -> Any:
    if training:
        raise TraceError("the exported program normalizes by the batch: export model.eval()")
    return functional.batch_norm(x, mean, variance, weight, bias, eps=eps)


def _group_norm(x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any) -> Any:
    return functional.group_norm(x, groups, weight, bias, eps)


def _instance_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, own: bool, *rest: Any) -> Any:
    return functional.instance_norm(x, mean, variance, weight, bias, own, *rest[:2])


def _quotient(tensor: Any, other: Any, rounding_mode: str | None = None) -> Any:
    return tensor / other if rounding_mode is None else torch.div(tensor, other, rounding_mode=rounding_mode)


def _power(base: Any, exponent: Any) -> Any:
    return base**exponent if isinstance(base, int | float) else base.pow(exponent)


def _softmax(x: Any, axis: int, dtype: Any = None) -> Any:
    return functional.softmax(x, axis, dtype=dtype)


def _to(x: Any, *args: Any, dtype: Any = None, **rest: Any) -> Any:
    dtype = dtype or next((value for value in args if isinstance(value, torch.dtype)), None)
    return x if dtype is None else x.to(dtype)


def _upsample(mode: str) -> Callable[..., Any]:
    def call(x: Any, size: Any, *rest: Any) -> Any:
        *corners, factors = rest
        size = None if size is None else tuple(size)
        factors = None if factors is None or size is not None else tuple(factors)
        align = corners[0] if corners else None
        return functional.interpolate(x, size, factors, mode, align)

    return call


def _index(x: Any, indices: Any) -> Any:
    return x[tuple(_ANYTHING if index is None else index for index in indices)]


def _same(x: Any, *rest: Any, **options: Any) -> Any:
    return x


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


_SPECIAL: dict[str, Callable[..., Any]] = {
    "add": _sum,
    "sub": _difference,
    "div": _quotient,
    "pow": _power,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "rsub": lambda tensor, other, alpha=1: _difference(other, tensor, alpha),
    "sym_size": lambda tensor, axis: tensor.shape[axis],
    "linear": lambda x, weight, bias=None: functional.linear(x, weight, bias),
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "softmax": _softmax,
    "_softmax": lambda x, axis, half_to_float: _softmax(x, axis),
    "slice": _slice,
    "select": _select,
    "index": _index,
    "view": lambda x, shape: x.reshape(shape),
    "_unsafe_view": lambda x, shape: x.reshape(shape),
    "split_with_sizes": lambda x, sizes, axis=0: x.split(sizes, axis),
    "constant_pad_nd": lambda x, pad, value=0: functional.pad(x, tuple(pad), "constant", value),
    "embedding": lambda weight, indices, *rest: functional.embedding(indices, weight),
    "where": torch.where,
    "linalg_vector_norm": torch.linalg.vector_norm,
    "scalar_tensor": lambda value, dtype=None, device=None, **_: torch.tensor(value, dtype=dtype, device=device),
    "_to_copy": _to,
    "to": _to,
    "contiguous": lambda x, **options: x.contiguous(),
    "clone": lambda x, **options: x.clone(),
    "lift_fresh_copy": lambda x: x.clone(),
    **{name: _convolution(getattr(functional, name)) for name in ("conv1d", "conv2d", "conv3d")},
    **{name: getattr(functional, name) for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")},
    **dict.fromkeys(("dropout", "feature_dropout", "dropout_"), _dropout),
    **dict.fromkeys(("alias", "detach", "detach_", "lift_fresh", "view_as"), _same),
    **dict.fromkeys(("_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range_for_size"), _nothing),
}  # fmt: skip
