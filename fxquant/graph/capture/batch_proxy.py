"""What a model is given in the place of tensors while it is traced: proxies that know what they would hold.

A `BatchProxy` carries a value at each of two batch sizes, a `ConstantProxy` a tensor that does not depend on the image.
Operations in place are recorded as operations that return their result, which the proxy stands for from then on; what
they mean for other views of the same memory is `in_place`'s matter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute

if TYPE_CHECKING:
    from fxquant.graph.capture.shape_tracer import ShapeTracer

_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift")


class BatchProxy(fx.Proxy):
    """A proxy that carries the node's value at each of two batch sizes."""

    batch_values: tuple[Any, Any]
    tracer: ShapeTracer

    def __getattr__(self, name: str) -> Any:
        """The attribute: a plain value where it does not depend on the batch, else a proxy; methods stay lazy."""
        if name == "batch_values":  # not set yet: the node is being created
            raise AttributeError(name)
        if name == "data":  # the same memory without gradients, and here nothing has gradients
            return self
        if callable(getattr(self.batch_values[0], name, None)):
            return Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        """Length of the first axis; raises TraceError of torch.fx where it is the batch."""
        lengths = [len(value) for value in self.batch_values]
        if lengths[0] != lengths[1]:
            raise fx.proxy.TraceError(
                "len() is asked of a tensor whose first axis is the batch, and the graph has to take any batch: where "
                "it is a size, as in expand(len(x), -1, -1), take x.shape[0]; a loop over images cannot be kept"
            )
        return lengths[0]

    def __setitem__(self, index: Any, value: Any) -> None:
        """x[:, 1:] = y, recorded as a new tensor that this proxy stands for from here on."""
        self.tracer.assign(self, index, value)


def _define_in_place(name: str) -> None:
    """x += y: a tensor changes, so every name of it sees the sum; a number does not."""
    out_of_place: Callable[[Any, Any], Any] = getattr(operator, name)
    in_place = getattr(operator, f"i{name.rstrip('_')}")

    def update(self: BatchProxy, other: Any) -> Any:
        if not isinstance(self.batch_values[0], torch.Tensor):
            return out_of_place(self, other)
        if not varies((self, other)):
            return self.tracer.create_proxy("call_function", in_place, (self, other), {})
        return self.tracer.write(self, out_of_place(self, other))

    setattr(BatchProxy, in_place.__name__.join(("__", "__")), update)


for _name in _IN_PLACE:
    _define_in_place(_name)


class ConstantProxy(BatchProxy):
    """A tensor known during the trace; it becomes a `get_attr` node only where it meets an activation."""

    def __init__(self, tensor: torch.Tensor, tracer: ShapeTracer) -> None:
        """The proxy of a tensor."""
        self.batch_values = (tensor, tensor)
        self.tracer = tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The `get_attr` node, created on first use."""
        if self._node is None:
            self._node = self.tracer.create_arg(self.batch_values[0])
        return self._node


def is_constant(value: Any) -> bool:
    """Whether a value is the same for every image."""
    return not isinstance(value, BatchProxy) or isinstance(value, ConstantProxy)


def varies(arguments: Any) -> bool:
    """Whether any argument depends on the image or on the batch."""
    found: list[bool] = []

    def look(argument: Any) -> None:
        found.append(not is_constant(argument.root if isinstance(argument, Attribute) else argument))

    map_aggregate(arguments, look)
    return any(found)


def proxies_in(arguments: Any) -> list[BatchProxy]:
    """Every proxy among the arguments that depends on the image or on the batch."""
    found: list[BatchProxy] = []

    def look(argument: Any) -> None:
        root: Any = argument.root if isinstance(argument, Attribute) else argument
        if not is_constant(root):
            found.append(root)

    map_aggregate(arguments, look)
    return found


def at_batch(arguments: Any, index: int) -> Any:
    """Arguments with every proxy replaced by its value at the `index`-th batch size."""

    def value_of(argument: Any) -> Any:
        if isinstance(argument, Attribute):
            root: Any = argument.root
            return getattr(root.batch_values[index], argument.attr)
        return argument.batch_values[index] if isinstance(argument, BatchProxy) else argument

    return map_aggregate(arguments, value_of)


def fakes_in(arguments: Any) -> list[FakeTensor]:
    """Every tensor without data among the arguments."""
    found: list[FakeTensor] = []
    map_aggregate(arguments, lambda argument: found.append(argument) if isinstance(argument, FakeTensor) else None)
    return found
