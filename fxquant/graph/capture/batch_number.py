"""Whole numbers that depend on the batch, and the calls in which torch would not take a proxy for one.

`torch.zeros(batch, n)` and `mask.expand(batch, -1)` name a size as an argument of its own. Where no argument is an
activation, torch reads such sizes itself, before anybody is asked, and takes nothing there but numbers. A `BatchNumber`
is therefore both: a proxy, and a symbolic integer for torch, which then lets a mode of this thread have the call. The
mode records it, and the graph makes the tensor anew for every batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from fxquant.graph.capture.batch_proxy import BatchProxy


class BatchNumber(BatchProxy, torch.SymInt):  # type: ignore[misc]
    """A proxy for a whole number that is not the same for every batch."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __hash__ = object.__hash__

    def _refuse(self) -> Any:
        raise fx.proxy.TraceError("Python needs to know how many images there are, and the graph has to take any batch")

    __int__ = __index__ = __float__ = _refuse


def counted(proxy: BatchProxy) -> BatchProxy:
    """The proxy, as a `BatchNumber` where its values are whole numbers."""
    if type(proxy.batch_values[0]) is int:
        proxy.__class__ = BatchNumber
    return proxy


class RecordSizes(TorchFunctionMode):
    """Within, a call of torch that is given a `BatchNumber` is recorded; it holds for this thread alone."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record the call, or let it run as it is.

        Args:
            func: what is called.
            types: classes of arguments that have a say of their own; not used.
            args, kwargs: what it is called with.
        """
        kwargs = kwargs or {}
        numbers = _numbers((args, kwargs))
        if not numbers:
            return func(*args, **kwargs)
        record = numbers[0].tracer.create_proxy
        func = _WITH_VALUES.get(func, func)
        if getattr(torch.Tensor, func.__name__, None) is func:
            return record("call_method", func.__name__, args, kwargs)
        return record("call_function", func, args, kwargs)


_WITH_VALUES: dict[Any, Callable[..., Any]] = {
    torch.empty: torch.zeros, torch.Tensor.new_empty: torch.Tensor.new_zeros, torch.Tensor.__getitem__: operator.getitem
}  # fmt: skip
"""What is recorded for a call: memory that nobody has written to would hold something else each time."""


def _numbers(arguments: Any) -> list[BatchNumber]:
    found: list[BatchNumber] = []
    map_aggregate(arguments, lambda argument: found.append(argument) if isinstance(argument, BatchNumber) else None)
    return found
