"""A graph from a file, run once with nothing in it: what its nodes give, against what the file says they give.

Every node gets a stand-in of its right shape and dtype for two images: functions and methods run on zeros, modules by
their rules (`module_shapes`). So all that the graph does is seen before a caller's image is in it:

- only tensors, numbers, sizes and tuples of them flow, and only tensors have their methods called;
- nothing writes to the image or to a constant, which torch's version counters show;
- shapes and dtypes are those that the file states, up to the batch size;
- what lives at one time, and what all nodes touch together, is bounded (`_Limits`); what an operation can blow up is
  known before it runs (`predicted_elements`).

torch's meta device is deliberately not used where it can be avoided: it loads torch's compiler, which takes seconds.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.shape_prop import TensorMetadata

from fxquant.artefact.matrix_products import stand_in
from fxquant.artefact.module_shapes import module_result
from fxquant.artefact.operation_sizes import check_numbers, predicted_elements, tensors_in
from fxquant.checks.untrusted import FLOATS
from fxquant.errors import ArtefactError
from fxquant.graph.nodes import tensor_at
from fxquant.graph.notes import IMAGE_SHAPE
from fxquant.graph.output_tree import leaves

_IMAGES = 2
_MOST_ITEMS = 2**16  # of a tuple that a node gives
_WHOLE = 2**63
_DTYPES = FLOATS | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_MIB = 2**20


@dataclass(frozen=True)
class _Limits:
    """Bytes that values may take for two images: at one time, and all nodes together.

    A tiny file may have a model of large activations, but these grow with the image: attention over patches of 4 x 4
    pixels, 16 heads, is the most that is expected.
    """

    alive: int
    touched: int

    @classmethod
    def of(cls, image_shape: tuple[int, ...], file_bytes: int) -> _Limits:
        pixels = math.prod(image_shape[1:])
        attention = _IMAGES * 16 * 4 * (pixels // 16 + 1) ** 2
        alive = max(64 * _MIB, 2 * file_bytes, attention)
        return cls(alive, 64 * alive)


def check_shapes(graph_module: GraphModule, file_bytes: int) -> None:
    """Raise ArtefactError, naming the node, unless the graph runs as described in this module.

    graph_module: just read from a file of `file_bytes` bytes; stays as it is.
    """
    image_shape = IMAGE_SHAPE.of(graph_module)
    limits = _Limits.of(image_shape, file_bytes)
    image = next(iter(graph_module.graph.nodes))
    stated = image.meta.get("tensor_meta")
    if len(image_shape) != 3 or 0 in image_shape or 4 * _IMAGES * math.prod(image_shape) > limits.alive:
        raise ArtefactError(f"the graph states no image of channels, height and width: {image_shape}")
    if not isinstance(stated, TensorMetadata) or stated.shape[1:] != torch.Size(image_shape) or not stated.shape[0]:
        raise ArtefactError(f"the graph's input does not have the shape of an image, {image_shape}")
    if stated.dtype not in FLOATS:
        raise ArtefactError(f"the graph's input is {stated.dtype}, which no image is")
    run = _Run(graph_module, limits, int(stated.shape[0]))
    with torch.inference_mode(False), torch.no_grad():  # inference tensors do not count their versions
        run.all(torch.zeros(_IMAGES, *image_shape, dtype=stated.dtype))


class _Run:
    """The values of a run, node by node; each is dropped after its last use."""

    def __init__(self, graph_module: GraphModule, limits: _Limits, stated_batch: int) -> None:
        self.graph_module, self.limits, self.stated_batch = graph_module, limits, stated_batch
        self.values: dict[Node, Any] = {}
        self.alive: Counter[int] = Counter()  # by storage, how many values are in it
        self.alive_bytes = self.touched_bytes = 0
        self.caller_owned: dict[int, Tensor] = {}  # by storage: the image and constants, held to the end

    def all(self, image: Tensor) -> None:
        """Run every node. Raises ArtefactError."""
        last_use: dict[Node, list[Node]] = {}
        seen: set[Node] = set()
        nodes = list(self.graph_module.graph.nodes)
        for node in reversed(nodes):
            for source in {*node.all_input_nodes, node} - seen:
                seen.add(source)
                last_use.setdefault(node, []).append(source)
        for node in nodes:
            where = f"node {node.name}"
            sources = [self.values[source] for source in node.all_input_nodes]
            versions = [(tensor, tensor._version) for tensor in tensors_in(sources)]
            try:
                value = image if node is nodes[0] else self.value(node, where)
            except ArtefactError as error:
                raise error if where in str(error) else ArtefactError(f"{where} ({_name(node)}): {error}") from error
            # The operations are torch's, their arguments anybody's: whatever torch objects to, the file is at fault.
            except Exception as error:
                raise ArtefactError(f"{where} ({node.op} {_name(node)}) cannot run: {error!s:.300}") from error
            self.keep(node, value, where)
            self.check_stated(node, value, where)
            if node.op in ("placeholder", "get_attr"):
                self.caller_owned.update((tensor.untyped_storage()._cdata, tensor) for tensor in tensors_in(value))
            written = [tensor for tensor, version in versions if tensor._version != version]
            if any(tensor.untyped_storage()._cdata in self.caller_owned for tensor in written):
                raise ArtefactError(f"{where} ({_name(node)}) writes to the image or to a constant, which must stay")
            for source in last_use.get(node, ()):
                self.drop(source)

    def value(self, node: Node, where: str) -> Any:
        """What a node gives. May raise anything."""
        arguments = map_arg((node.args, node.kwargs), self.values.__getitem__)
        args, kwargs = arguments
        if node.op == "placeholder":
            return args[0]
        if node.op == "output":
            return _checked_output(node.args[0], args[0])
        if node.op == "get_attr":
            return tensor_at(self.graph_module, node).detach().clone()
        tensors = list(tensors_in(arguments))
        self.touch(sum(_bytes(tensor) for tensor in tensors), where)
        if node.op == "call_module":
            return module_result(self.graph_module.get_submodule(str(node.target)), args, self.reserve)
        if node.op == "call_method":
            return self.method(str(node.target), args, kwargs)
        function: Any = node.target
        check_numbers(function, args, kwargs)
        known = stand_in(function.__name__, args, kwargs, self.reserve)
        if known is not None:
            return known
        self.reserve(predicted_elements(function.__name__, args, kwargs))
        return function(*args, **kwargs)

    def method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a tensor's method gives; sizes have `numel`."""
        if isinstance(args[0], torch.Size) and name == "numel" and len(args) == 1 and not kwargs:
            return args[0].numel()
        if not isinstance(args[0], Tensor):
            raise ArtefactError(f"the method {name!r} is called on a {type(args[0]).__name__}, not on a tensor")
        known = stand_in(name, args, kwargs, self.reserve)
        if known is not None:
            return known
        self.reserve(predicted_elements(name, args, kwargs))
        return getattr(args[0], name)(*args[1:], **kwargs)

    def reserve(self, elements: int) -> None:
        """Raise ArtefactError where a tensor of so many elements would be too much."""
        if 4 * elements > self.limits.alive:
            raise ArtefactError(f"it gives {elements} elements for {_IMAGES} images, more than such a file needs")

    def touch(self, size: int, where: str) -> None:
        """Count bytes that a node reads or writes; views count as if they were copied."""
        self.touched_bytes += size
        if size > self.limits.alive or self.touched_bytes > self.limits.touched:
            raise ArtefactError(
                f"{where} has values of {size >> 20} MiB for {_IMAGES} images, more than such a file needs"
            )

    def keep(self, node: Node, value: Any, where: str) -> None:
        """Hold a value, once it is one that may flow."""
        _check_value(value, where)
        self.values[node] = value
        for tensor in tensors_in(value):
            self.touch(_bytes(tensor), where)
            storage = tensor.untyped_storage()
            self.alive_bytes += 0 if self.alive[storage._cdata] else storage.nbytes()
            self.alive[storage._cdata] += 1
        if self.alive_bytes > self.limits.alive:
            raise ArtefactError(
                f"{where} is where the graph holds {self.alive_bytes >> 20} MiB for {_IMAGES} images, more than such a "
                "file needs"
            )

    def drop(self, node: Node) -> None:
        """Let a value go."""
        for tensor in tensors_in(self.values.pop(node)):
            storage = tensor.untyped_storage()
            self.alive[storage._cdata] -= 1
            if not self.alive[storage._cdata]:
                del self.alive[storage._cdata]
                self.alive_bytes -= storage.nbytes()

    def check_stated(self, node: Node, value: Any, where: str) -> None:
        """Raise ArtefactError where the file says another shape or dtype; a shape it does not say is written down."""
        stated = node.meta.get("tensor_meta")
        if stated is None or node.op == "output":
            return
        if not isinstance(value, Tensor):
            raise ArtefactError(f"{where} gives a {type(value).__name__}, and the file says a tensor")
        pairs = list(zip(value.shape, stated.shape, strict=False))
        grown = [found * self.stated_batch == said * _IMAGES and found != said for found, said in pairs]
        is_same = all(found == said or more for (found, said), more in zip(pairs, grown, strict=True))
        if value.ndim != len(stated.shape) or not is_same or sum(grown) > 1 or value.dtype != stated.dtype:
            raise ArtefactError(
                f"{where} gives {value.dtype} {tuple(value.shape)} for {_IMAGES} images, and the file says "
                f"{stated.dtype} {tuple(stated.shape)} for {self.stated_batch}"
            )


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _checked_output(returned: Any, value: Any) -> Any:
    """A tensor for every node that is returned.

    Args:
        returned: one node, or several.
        value: what they give.
    """
    found = (value,) if isinstance(returned, Node) else leaves(value)
    if not all(isinstance(leaf, Tensor) for leaf in found):
        raise ArtefactError(f"the graph gives a {type(value).__name__}, not tensors")
    if not found:
        raise ArtefactError("the graph gives no tensor")
    return value


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _check_value(value: Any, where: str, depth: int = 0) -> None:
    """Raise ArtefactError unless a value is one that may flow between nodes."""
    if isinstance(value, tuple | list) and depth < 4:
        if len(value) > _MOST_ITEMS:
            raise ArtefactError(f"{where} gives {len(value)} values, more than a model needs")
        for item in value:
            _check_value(item, where, depth + 1)
    elif isinstance(value, Tensor):
        is_plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not is_plain or value.device.type != "cpu" or value.dtype not in _DTYPES:
            raise ArtefactError(f"{where} gives a tensor of a kind that graphs in files may not have: {value.dtype}")
    elif type(value) is int:
        if not -_WHOLE <= value < _WHOLE:
            raise ArtefactError(f"{where} gives a whole number that does not fit 64 bits")
    elif not (value is None or type(value) in (bool, float, str, torch.dtype, torch.device, torch.Size)):
        raise ArtefactError(f"{where} gives a {type(value).__name__}, which may not flow in a graph from a file")
