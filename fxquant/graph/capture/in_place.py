"""Operations that change a tensor in place, as operations that return what is there afterwards.

The graph has no memory that two names share: `x.mul_(2)` is recorded as `x.mul(2)`, and the proxy x stands for the
result from then on, for every name the model has for it. Other views of the memory (`y = x[:, 0]`) would go on showing
what was there before. They are found by the memory that the tensors without data share, element by element, and reading
one of them afterwards is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxquant.errors import TraceError
from fxquant.graph.capture.batch_proxy import BatchProxy, is_constant

_WHOLE = [slice(start, None, step) for start in (None, 0) for step in (None, 1)]
_SHAPES = frozenset({"shape", "ndim", "dtype", "device", "size", "dim", "numel", "stride"})


def in_place_call(kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, Callable[[], Any]] | None:
    """What a call writes to and a function that records what is there afterwards; None where it writes to nothing.

    Args:
        kind: "call_method" or "call_function".
        target: the method's name or the function.
        args, kwargs: its arguments, with proxies for tensors.
    """
    first = args[0] if args else kwargs.get("input")
    name = str(target if kind == "call_method" else getattr(target, "__name__", ""))
    if kind == "call_function" and isinstance(kwargs.get("out"), BatchProxy):
        rest = {key: value for key, value in kwargs.items() if key != "out"}
        return kwargs["out"], lambda: target(*args, **rest)
    if kind == "call_function" and kwargs.get("inplace"):
        return first, lambda: target(*args, **{**kwargs, "inplace": False})
    if not name.endswith("_") or name.endswith("__"):
        return None
    plain = _METHODS.get(name) or _out_of_place(name.removesuffix("_"), kind == "call_method")
    return None if plain is None else (first, lambda: plain(*args, **kwargs))


def _out_of_place(name: str, is_method: bool) -> Callable[..., Any] | None:
    if not is_method:
        return getattr(functional, name, None) or getattr(torch, name, None)
    if not callable(getattr(Tensor, name, None)):
        return None
    return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)


def like(value: Any, target: Any) -> Any:
    """A value that is assigned to `target`, in the shape and dtype of that."""
    if not isinstance(value, BatchProxy | Tensor):
        return torch.full_like(target, value)
    is_whole = len(value.shape) == len(target.shape) and all(
        bool(a == b) for a, b in zip(value.shape, target.shape, strict=True)
    )
    value = value if is_whole else value.expand_as(target)
    return value if value.dtype == target.dtype else value.to(target.dtype)


_METHODS: dict[str, Callable[..., Any]] = {
    "copy_": lambda tensor, source, non_blocking=False: like(source, tensor).clone(),
    "fill_": lambda tensor, value: like(value, tensor).clone(),
    "zero_": lambda tensor: torch.zeros_like(tensor),
    "requires_grad_": lambda tensor, requires_grad=True: tensor,
    "detach_": lambda tensor: tensor,
}


def assigned(target: Any, index: tuple[Any, ...], value: Any, axis: int = 0) -> Any:
    """`target` with target[index] = value, from the outermost axis that is indexed inwards; slices and integers.

    Args:
        target: a tensor, or what stands for it during the trace.
        index: integers and slices, one for each axis from `axis` on.
        value: the new value of the elements that are assigned to.
        axis: the first axis that is indexed.
    """
    while index and index[0] in _WHOLE:
        index, axis = index[1:], axis + 1
    if not index:
        return like(value, target)
    part, rest = index[0], index[1:]
    region = target[(slice(None),) * axis + (part,)]
    if isinstance(part, int):
        return torch.select_scatter(target, assigned(region, rest, value, axis), axis, part)
    size = target.shape[axis]
    if not isinstance(size, int):
        raise TraceError("a part of the batch is assigned to, and every image has to be computed alike")
    start, stop, step = part.indices(size)
    return torch.slice_scatter(target, assigned(region, rest, value, axis + 1), axis, start, stop, step)


def whole_index(index: Any, rank: int) -> tuple[Any, ...]:
    """An index as a tuple of slices and integers without an ellipsis; raises TraceError for any other."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis for part in parts):
        place = next(place for place, part in enumerate(parts) if part is Ellipsis)
        parts = (*parts[:place], *[slice(None)] * (rank - len(parts) + 1), *parts[place + 1 :])
    if not all(isinstance(part, slice | int) and not isinstance(part, bool) for part in parts):
        raise TraceError("assignment into a tensor can be traced where its index is made of slices and integers only")
    return parts


class Memory:
    """Which nodes show memory that has been written to since."""

    def __init__(self) -> None:
        self._values: dict[fx.Node, Tensor] = {}
        self._written: dict[fx.Node, list[Tensor]] = {}

    def keep(self, node: fx.Node, value: Tensor) -> None:
        """Remember a node's tensor, so that its memory is not taken for another's."""
        self._values[node] = value

    def write(self, written: Tensor) -> None:
        """Everything that shares an element with this tensor is out of date."""
        for node, value in self._values.items():
            if _overlap(value, written):
                self._written.setdefault(node, []).append(written)

    def accept(self, node: fx.Node, region: Tensor) -> None:
        """A part of the node's tensor is about to be replaced: what was written inside that part does not matter."""
        rest = [written for written in self._written.pop(node, []) if not _covers(region, written)]
        if rest:
            self._written[node] = rest

    def check(self, proxy: BatchProxy, target: Any, args: Any) -> None:
        """Raise TraceError where an operation reads the values of a node that is out of date.

        Args:
            proxy: the call that is about to be recorded.
            target: the function or the name of the method that is called.
            args: the arguments of that call.
        """
        name = args[1] if target is getattr else target
        if is_constant(proxy) or proxy.node not in self._written or (isinstance(name, str) and name in _SHAPES):
            return
        raise TraceError(
            f"'{proxy.node.name}' is read after another view of its memory was changed in place: work on a copy there "
            f"(x = x.clone()), or use an operation that returns its result"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    if not share_memory(a, b):
        return False
    layout_a, layout_b = ((x.shape, x.stride(), x.storage_offset(), x.element_size()) for x in (a, b))
    return layout_a == layout_b or layout_a[3] != layout_b[3] or bool((_touched(a) & _touched(b)).any())


def _covers(region: Tensor, written: Tensor) -> bool:
    return share_memory(region, written) and bool(_touched(region)[_touched(written)].all())


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of one memory."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _touched(x: Tensor) -> Tensor:
    """Which elements of its memory a tensor consists of, bool (elements of the memory,)."""
    elements = x.untyped_storage().nbytes() // x.element_size()
    places = torch.arange(elements).as_strided(x.shape, x.stride(), x.storage_offset())
    touched = torch.zeros(elements, dtype=torch.bool)
    touched[places.flatten()] = True
    return touched
