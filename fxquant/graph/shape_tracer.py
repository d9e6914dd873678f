"""A tracer that knows every shape except the batch: the model's Python runs once, and only tensor work is recorded.

Each proxy carries what the node would hold at two batch sizes, as fake tensors. An integer or flag that is the same
for both does not depend on the batch and is handed to the model as a plain Python value, so arithmetic on image sizes,
window padding, assertions and `if` on shapes run as ordinary Python and leave nothing in the graph. Parameters are
handed over as they are: what is computed from parameters alone (position bias tables, concatenated q/k/v biases,
standardized weights) is computed during the trace and enters the graph as one constant. Functions that a model wrapped
for `torch.fx` are called through, and modules that do nothing in inference leave no node.

Consequences: a graph is valid for any batch size and for the image size it was traced at. Control flow on activation
values cannot be traced, by design.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import _symbolic_trace
from torch.fx.node import map_aggregate
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.fx.proxy import Attribute

# Two batch sizes tell what depends on the batch; 1 is avoided because it broadcasts.
_BATCH_SIZES = (2, 3)
_NO_OPERATION = (nn.Identity, nn.modules.dropout._DropoutNd)


class BatchProxy(fx.Proxy):
    """A proxy that carries the node's value at each of two batch sizes."""

    batch_values: tuple[Any, Any]

    def __getattr__(self, name: str) -> Any:
        """The attribute: a plain value where it does not depend on the batch, else a proxy; methods stay lazy."""
        if name == "batch_values":  # not set yet: the node is being created
            raise AttributeError(name)
        if callable(getattr(self.batch_values[0], name, None)):
            return Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        """Length of the first axis; raises TraceError of torch.fx where it is the batch."""
        lengths = [len(value) for value in self.batch_values]
        if lengths[0] != lengths[1]:
            raise fx.proxy.TraceError("len() of a tensor whose first axis is the batch")
        return lengths[0]

    def __setitem__(self, index: Any, value: Any) -> None:
        """x[:, 1:] = y, recorded as a new tensor that this name stands for from here on; other views keep the old."""
        index = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, slice) for part in index):
            raise fx.proxy.TraceError("assignment into a tensor is traced for slices only")
        changed = _assign(self, index, value, 0)
        self.node, self.batch_values = changed.node, changed.batch_values


def _assign(target: Any, index: tuple[slice, ...], value: Any, axis: int) -> Any:
    """`target` with target[index] = value, from the outermost sliced axis inwards."""
    while index and index[0] == slice(None):
        index, axis = index[1:], axis + 1
    if not index:
        return value
    part = index[0]
    inner = _assign(target[(slice(None),) * axis + (part,)], index[1:], value, axis + 1)
    start, stop, step = part.indices(target.shape[axis])
    return torch.slice_scatter(target, inner, axis, start, stop, step)


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
            self._node = self.tracer.create_arg(self.batch_values[0])  # type: ignore[assignment]
        return self._node  # type: ignore[return-value]


class ShapeTracer(fx.Tracer):
    """Traces an image model at the shape of an example, with the batch left free.

    example_bchw: float (B, C, H, W); only its shape and dtype are used. After `trace`, `read_tensors` holds the ids of
    the parameters and buffers that the model's own code has read.
    """

    def __init__(self, example_bchw: torch.Tensor) -> None:
        """A tracer for one trace."""
        no_modules: Any = ()  # torch's annotations ask for exactly one
        super().__init__(autowrap_modules=no_modules)
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._example_bchw = example_bchw
        self._evaluating = False
        self._path_of_tensor: dict[int, str] = {}
        self.read_tensors: set[int] = set()

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Record the model's graph; functions wrapped with `torch.fx.wrap` are traced through."""
        if not isinstance(root, nn.Module):
            raise TypeError(f"a module is traced, not {type(root).__name__}")
        for path, tensor in (*root.named_parameters(), *root.named_buffers()):
            self._path_of_tensor[id(tensor)] = path
        wrapped = dict(_symbolic_trace._wrapped_fns_to_patch)
        _symbolic_trace._wrapped_fns_to_patch.clear()
        try:
            return super().trace(root, concrete_args)
        finally:
            _symbolic_trace._wrapped_fns_to_patch.update(wrapped)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder, the image; every other argument of forward keeps its default."""
        name = root_fn.__code__.co_varnames[1]
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers become constants."""
        is_read_by_model = isinstance(attr_val, torch.Tensor) and not self._evaluating
        if is_read_by_model:
            self.read_tensors.add(id(attr_val))
        return ConstantProxy(attr_val, self) if is_read_by_model else attr_val

    def create_arg(self, a: Any) -> Any:
        """Tensors are read from the module that owns them; a computed one becomes a buffer where it was computed."""
        if not isinstance(a, torch.Tensor):
            return super().create_arg(a)
        if id(a) not in self._path_of_tensor:
            owner = self.root.get_submodule(self.scope.module_path)
            name = next(name for name in _constant_names() if name not in owner._buffers)
            owner.register_buffer(name, a)
            self._path_of_tensor[id(a)] = f"{self.scope.module_path}.{name}".lstrip(".")
        return self.create_node("get_attr", self._path_of_tensor[id(a)], (), {})

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Skip modules without effect, run modules that see constants only, trace the others."""
        if isinstance(m, _NO_OPERATION):
            return args[0] if args else next(iter(kwargs.values()))
        if self._evaluating or not _varies((args, kwargs)):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> BatchProxy:
        """A proxy that can carry values."""
        return BatchProxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        """Record a node and return its proxy, or the plain value where that does not depend on the batch."""
        if kind in ("call_function", "call_method") and not _varies((args, kwargs)):
            return self._constant(self._evaluate(kind, target, args, kwargs, 0))
        first, second = (self._evaluate(kind, target, args, kwargs, index) for index in range(2))
        if _is_known(first, second):
            return first
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        proxy.batch_values = (first, second)  # type: ignore[attr-defined]
        if isinstance(first, torch.Tensor):
            proxy.node.meta["tensor_meta"] = _extract_tensor_metadata(first)
        if _is_aggregate(first) and len(first) == len(second):
            getters = [self.create_proxy("call_function", operator.getitem, (proxy, i), {}) for i in range(len(first))]
            return getters if isinstance(first, list) else tuple(getters)
        return proxy

    def iter(self, obj: Any) -> Iterator[Any]:
        """Iterate over the first axis where its length is known."""
        return iter([obj[i] for i in range(len(obj))])

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Truth of a value that depends on the batch or on activations: not traceable."""
        raise fx.proxy.TraceError("control flow depends on the batch size or on activation values")

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any, index: int) -> Any:
        """What the node holds at the `index`-th batch size, computed without data."""
        if kind == "placeholder":
            shape = (_BATCH_SIZES[index], *self._example_bchw.shape[1:])
            return self._fake_mode.from_tensor(torch.empty(shape, dtype=self._example_bchw.dtype))
        args, kwargs = _at_batch(args, index), _at_batch(kwargs, index)
        if kind == "output":
            return args[0]
        self._evaluating = True
        try:
            with self._fake_mode if _has_fake((args, kwargs)) else nullcontext():
                if kind == "call_module":
                    return self.root.get_submodule(target)(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return target(*args, **kwargs)
        finally:
            self._evaluating = False

    def _constant(self, value: Any) -> Any:
        """The value with its tensors as constants of the graph."""

        def enter(item: Any) -> Any:
            return ConstantProxy(item, self) if isinstance(item, torch.Tensor) else item

        return map_aggregate(value, enter)


def _at_batch(arguments: Any, index: int) -> Any:
    """Arguments with every proxy replaced by its value at the `index`-th batch size."""

    def value_of(argument: Any) -> Any:
        if isinstance(argument, Attribute):
            return getattr(argument.root.batch_values[index], argument.attr)  # type: ignore[index]
        return argument.batch_values[index] if isinstance(argument, BatchProxy) else argument

    return map_aggregate(arguments, value_of)


def _varies(arguments: Any) -> bool:
    """Whether any argument depends on the image or on the batch."""
    found: list[bool] = []

    def look(argument: Any) -> None:
        root = argument.root if isinstance(argument, Attribute) else argument
        found.append(isinstance(root, fx.Proxy) and not isinstance(root, ConstantProxy))

    map_aggregate(arguments, look)
    return any(found)


def _has_fake(arguments: Any) -> bool:
    found: list[bool] = []
    map_aggregate(arguments, lambda argument: found.append(isinstance(argument, FakeTensor)))
    return any(found)


def _constant_names() -> Iterator[str]:
    yield "constant"
    yield from (f"constant_{index}" for index in count(1))


def _is_known(first: Any, second: Any) -> bool:
    """Whether a value is the same at both batch sizes; tensors, alone or in a container, never are."""
    return not isinstance(first, (torch.Tensor, tuple, list)) and bool(first == second)


def _is_aggregate(value: Any) -> bool:
    return type(value) in (tuple, list, torch.Size)
