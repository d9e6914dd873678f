"""A tracer that knows every shape except the batch: the model's Python runs once, and only tensor work is recorded.

Each proxy carries what the node would hold at two batch sizes, as fake tensors. An integer or flag that is the same
for both does not depend on the batch and is handed to the model as a plain Python value, so arithmetic on image sizes,
window padding, assertions and `if` on shapes run as ordinary Python and leave nothing in the graph. Parameters are
handed over as they are: what is computed from parameters alone (position bias tables, concatenated q/k/v biases,
standardized weights) is computed during the trace and enters the graph as one constant. Functions that a model wrapped
for `torch.fx` are called through, and modules that do nothing in inference leave no node.

Hooks run as in any call, and what they do is recorded; so is the forward of every module that is not exactly one of
torch.nn (`leaves`). Only the modules of the traced copy are watched (`interception`), never the process.

Consequences: a graph is valid for any batch size and for the image size it was traced at. Control flow on activation
values cannot be traced, by design.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._symbolic_trace import _is_fx_tracing_context
from torch.fx.node import map_aggregate
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.fx.proxy import Scope, ScopeContextManager

from fxquant.errors import TraceError
from fxquant.graph.capture.batch_number import RecordSizes, counted
from fxquant.graph.capture.batch_proxy import (
    BatchProxy,
    ConstantProxy,
    at_batch,
    fakes_in,
    proxies_in,
    varies,
)
from fxquant.graph.capture.einops_backend import register_proxies
from fxquant.graph.capture.forms import FORMS
from fxquant.graph.capture.in_place import Memory, assigned, in_place_call, share_memory, whole_index
from fxquant.graph.capture.interception import intercepted
from fxquant.graph.capture.leaves import has_no_effect, is_leaf
from fxquant.graph.capture.multi_head_attention import TAKE_TENSORS, written_out
from fxquant.graph.capture.size_only import made_of_sizes
from fxquant.graph.names import free_name
from fxquant.graph.output_tree import flatten

# Two batch sizes tell what depends on the batch; 1 is avoided because it broadcasts.
_BATCH_SIZES = (2, 3)
_IMAGE = "x"
_CONVERSIONS = frozenset({"to", "float", "double", "type", "type_as"})


class ShapeTracer(fx.Tracer):
    """Traces an image model at the shape of an example, with the batch left free.

    example_bchw: float (B, C, H, W); only its shape, dtype and device are used. After `record`, `read_tensors` holds
    the ids of the parameters and buffers that the model's own code has read; after it failed, `failed_in` is the path
    of the module in which it did.
    """

    def __init__(self, example_bchw: torch.Tensor) -> None:
        """A tracer for one trace."""
        no_modules: Any = ()  # torch's annotations ask for exactly one
        super().__init__(autowrap_modules=no_modules)
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._example_bchw = example_bchw
        self._evaluating = False
        self._path_of_tensor: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []  # an id stands for a tensor only as long as that is alive
        self._memory = Memory()
        self._overwritten: dict[int, BatchProxy] = {}
        self.read_tensors: set[int] = set()
        self.failed_in: str | None = None

    def record(self, root: nn.Module) -> fx.Graph:
        """Call the model on a proxy for the image, and return the graph of what it did."""
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.graph._graph_namespace.create_name("self", None)  # the name of the module in the code of a graph
        self.tensor_attrs = {}
        modules = dict(root.named_modules())
        self.submodule_paths = {module: path for path, module in modules.items()}
        self._kinds = {module: type(module) for module in modules.values()}
        self._leaves = {module for module in modules.values() if is_leaf(module)}
        self._no_operations = {module for module in modules.values() if has_no_effect(module)}
        self._in_place = {module for module in self._leaves if getattr(module, "inplace", False)}
        for module in self._in_place:
            module.inplace = False
        for path, tensor in (*root.named_parameters(), *root.named_buffers()):
            self._path_of_tensor[id(tensor)] = path
        register_proxies()
        # The flag is this thread's own: functions compiled by torch.compile refuse proxies by it.
        with written_out(root), intercepted(root, self), _is_fx_tracing_context(True), RecordSizes():
            result = root(self.create_proxy("placeholder", _IMAGE, (), {}))
        tree, tensors = flatten(result, lambda value: isinstance(value, (BatchProxy, torch.Tensor)))
        for proxy in proxies_in(tensors):
            self._memory.check(proxy, "output", ())
            if not isinstance(proxy.batch_values[0], torch.Tensor):
                raise TraceError("the model returns a number that depends on how many images there are")
        self.create_node("output", "output", (self.create_arg(tensors[0] if tree.is_bare else tuple(tensors)),), {})
        self.submodule_paths = None
        return self.graph

    def read(self, value: Any) -> Any:
        """Parameters and buffers become constants."""
        if not isinstance(value, torch.Tensor) or self._evaluating:
            return value
        self.read_tensors.add(id(value))
        overwritten = self._overwritten.get(id(value))
        return ConstantProxy(value, self) if overwritten is None else overwritten

    def assign_attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        """A constant is set as the tensor it is; what depends on the image takes a buffer's place for this forward.

        Args: see `Observer.assign_attribute`.
        """
        if isinstance(value, ConstantProxy):
            return value.batch_values[0]
        if isinstance(value, BatchProxy) and name in module._buffers:
            self._overwritten[id(module._buffers[name])] = value
            return module._buffers[name]
        return value

    def create_arg(self, a: Any) -> Any:
        """Tensors are read from the module that owns them; any other becomes a buffer where it was met."""
        if isinstance(a, BatchProxy):
            return a.node
        if not isinstance(a, torch.Tensor):
            return super().create_arg(a)
        if id(a) not in self._path_of_tensor:
            owner = self.root.get_submodule(self.scope.module_path)
            name = free_name(owner, "constant")
            owner._buffers[name] = a.detach().clone()  # it may be the caller's own
            self._alive.append(a)
            self._path_of_tensor[id(a)] = f"{self.scope.module_path}.{name}".lstrip(".")
        return self.create_node("get_attr", self._path_of_tensor[id(a)], (), {})

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Skip modules without effect, run modules that see constants only, trace the others.

        Args: see `Observer.call_module`.
        """
        if m in self._no_operations:
            return args[0] if args else next(iter(kwargs.values()))
        if m is self.root or self._evaluating or not varies((args, kwargs)):
            return forward(*args, **kwargs)
        args = tuple(self._handed_on(m, argument) for argument in args)
        kwargs = {key: self._handed_on(m, argument) for key, argument in kwargs.items()}
        path = self.path_of_module(m)
        calls = self.num_calls.get(path, 0)
        self.num_calls[path] = calls + 1
        key = f"{path}@{calls}" if calls else path
        with ScopeContextManager(self.scope, Scope(path, self._kinds[m])):
            self.module_stack[key] = (path, self._kinds[m])
            try:
                if m not in self._leaves:
                    return forward(*args, **kwargs)
                result = self.create_proxy("call_module", path, args, kwargs)
                return self.write(args[0] if args else kwargs["input"], result) if m in self._in_place else result
            except Exception:
                self.failed_in = self.failed_in or path
                raise
            finally:
                self.module_stack.popitem()

    def _handed_on(self, module: nn.Module, argument: Any) -> Any:
        """An argument as the module takes it."""
        if isinstance(module, TAKE_TENSORS):  # their masks may be tensors only
            return argument.batch_values[0] if isinstance(argument, ConstantProxy) else argument
        # A tensor that the model has made meets the batch size behind this call, as in mask.expand(batch, -1, -1).
        return self._constant(argument) if isinstance(argument, torch.Tensor) else argument

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
        """Record a node and return its proxy, or the plain value where that does not depend on the batch.

        Args: see `torch.fx.Tracer.create_proxy`.
        """
        if kind in ("call_function", "call_method"):
            if not varies((args, kwargs)):
                return self._constant(self._evaluate(kind, target, args, kwargs, 0))
            written = in_place_call(kind, target, args, kwargs)
            if written is not None:
                return self.write(written[0], written[1]())
            form = FORMS.get(target)
            result = NotImplemented if form is None else form(*args, **kwargs)
            if result is not NotImplemented:
                return result
        first, second = (self._evaluate(kind, target, args, kwargs, index) for index in range(2))
        if _is_known(first, second):
            return first
        if (made := made_of_sizes(target, args, kwargs, (first, second))) is not None:
            return self._constant(made)
        if target in _CONVERSIONS and first is at_batch(args[0], 0):
            return args[0]
        for argument in proxies_in((args, kwargs)):
            self._memory.check(argument, target, args)
        proxy: Any = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        proxy.batch_values = (first, second)
        if isinstance(first, torch.Tensor):
            proxy.node.meta["tensor_meta"] = _extract_tensor_metadata(first)
            self._memory.keep(proxy.node, first)
        if _is_aggregate(first) and len(first) == len(second):
            getters = [self.create_proxy("call_function", operator.getitem, (proxy, i), {}) for i in range(len(first))]
            return _like(first, getters)
        return counted(proxy)

    def write(self, written: Any, value: Any) -> Any:
        """Let the proxy that is written to stand for the value from now on, and return it."""
        if not isinstance(written, BatchProxy):
            raise TraceError("a tensor that is no part of the model is changed by one that depends on the image")
        if not isinstance(value, BatchProxy):
            value = self._constant(value)
        before = written.batch_values[0]
        if value.dtype != before.dtype:
            value = value.to(before.dtype)
        if isinstance(written, ConstantProxy):
            self._alive.append(before)
            self._overwritten[id(before)] = written
            written.__class__ = BatchProxy  # type: ignore[assignment]
        elif not share_memory(before, value.batch_values[0]):
            self._memory.write(before)
        written.node, written.batch_values = value.node, value.batch_values
        return written

    def assign(self, target: BatchProxy, index: Any, value: Any) -> None:
        """target[index] = value.

        Args:
            target: the tensor that is written to.
            index: which of its elements are written, as in target[index].
            value: what is written to them.
        """
        if isinstance(target, ConstantProxy) and not varies((index, value)):
            target.batch_values[0][at_batch(index, 0)] = at_batch(value, 0)
            return
        parts = whole_index(index, len(target.batch_values[0].shape))
        if not isinstance(target, ConstantProxy):
            self._memory.accept(target.node, target.batch_values[0][parts])
        self.write(target, assigned(target, parts, value))

    def iter(self, obj: Any) -> Iterator[Any]:
        """Iterate over the first axis where its length is known."""
        return iter([obj[i] for i in range(len(obj))])

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Truth of a constant; of a value that depends on the batch or on activations it is not traceable."""
        if isinstance(obj, ConstantProxy):
            return bool(obj.batch_values[0])
        raise fx.proxy.TraceError("control flow depends on the batch size or on activation values")

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any, index: int) -> Any:
        """What the node holds at the `index`-th batch size, computed without data."""
        if kind == "placeholder":
            shape = (_BATCH_SIZES[index], *self._example_bchw.shape[1:])
            return self._fake_mode.from_tensor(self._example_bchw.new_empty(shape))
        args, kwargs = at_batch(args, index), at_batch(kwargs, index)
        fakes = fakes_in((args, kwargs))
        versions = _versions(fakes)
        self._evaluating = True
        try:
            with self._fake_mode if fakes else nullcontext():
                result = self._run(kind, target, args, kwargs)
        finally:
            self._evaluating = False
        if _versions(fakes) != versions:
            raise TraceError(f"{target} changes its arguments in place: use an operation that returns its result")
        return result

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _constant(self, value: Any) -> Any:
        """The value with its tensors as constants of the graph."""

        def enter(item: Any) -> Any:
            return ConstantProxy(item, self) if isinstance(item, torch.Tensor) else item

        entered = map_aggregate(value, enter)
        return _like(value, entered) if _has_names(value) else entered


def _versions(tensors: list[FakeTensor]) -> list[int]:
    """How often each tensor was written to; tensors made in inference mode do not count."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _is_known(first: Any, second: Any) -> bool:
    """Whether a value is the same at both batch sizes; tensors, alone or in a container, never are."""
    return not isinstance(first, (torch.Tensor, tuple, list)) and bool(first == second)


def _is_aggregate(value: Any) -> bool:
    return type(value) in (tuple, list, torch.Size) or _has_names(value)


def _has_names(value: Any) -> bool:
    """Whether it is several tensors with names, such as the values and indices of a maximum."""
    return type(value).__module__ == "torch.return_types"


def _like(value: Any, items: Any) -> Any:
    """Items in the container of a value; sizes become a plain tuple, since a torch.Size takes no proxies."""
    return type(value)(items) if isinstance(value, list) or _has_names(value) else tuple(items)
