"""The graph while it is lowered: which nodes will run as integers, on which codes, and where bytes flow already.

`PlanIntegers` marks what kernels can run exactly and puts a ToCodes node on each of its quantized inputs, one for all
readers of an edge that share a quantizer, as early as the bytes can be made: before views, transposes, rolls and
zero-padding. Rewrites (`passes.lower.rewrites`) change what is planned; `PackLayers` builds the modules.

A plan stands in the nodes themselves, see `planned_of`, and a node that gives codes calls a ToCodes, see `code_of`: so
a rewrite needs the graph only.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import TensorMetadata
from torch.nn import functional

from fxquant.graph.annotation import annotation_of
from fxquant.graph.nodes import input_of, module_of
from fxquant.graph.notes import EXECUTION, execution_of
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.lowered import Epilogue, RowLogToCodes, ToCodes

_PLANNED = "fxquant_planned"
_MOVES = {
    "view", "reshape", "permute", "transpose", "contiguous", "flatten", "unsqueeze", "squeeze", "roll",
    torch.roll, torch.permute, torch.transpose, torch.reshape, torch.flatten,
}  # fmt: skip
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul")
SUMS = (operator.add, operator.iadd, torch.add, "add")


@dataclass(frozen=True)
class Planned:
    """A node that will run as integers.

    Args:
        codes: how each of its inputs is bytes.
        layers: public names of the layers that it runs.
        epilogue: what happens to its result.
    """

    codes: tuple[ByteCode, ...]
    layers: tuple[str, ...]
    epilogue: Epilogue = field(default_factory=Epilogue)


def planned_of(node: Node | None) -> Planned | None:
    """What is planned for a node; None where it does not run as integers, or has been built."""
    return None if node is None else node.meta.get(_PLANNED)


def set_planned(node: Node, planned: Planned | None) -> None:
    """Plan a node; None: it is done."""
    node.meta.pop(_PLANNED, None)
    if planned is not None:
        node.meta[_PLANNED] = planned


def planned_nodes(graph_module: GraphModule) -> list[Node]:
    """Nodes that will run as integers, in graph order."""
    return [node for node in graph_module.graph.nodes if planned_of(node) is not None]


def set_epilogue(node: Node, epilogue: Epilogue) -> None:
    """Change what a planned node does with its result."""
    planned = planned_of(node)
    assert planned is not None  # rewrites ask before
    set_planned(node, replace(planned, epilogue=epilogue))
    if epilogue.gives_codes:
        set_dtype(node, torch.uint8)


def code_of(graph_module: GraphModule, node: Node | None) -> ByteCode | None:
    """The code of a node that does nothing but give codes; None for all others."""
    module = module_of(graph_module, node)
    return module.code if type(module) in (ToCodes, RowLogToCodes) else None  # type: ignore[union-attr, return-value]


def note_kernel(graph_module: GraphModule, kernel: str, *layers: str) -> None:
    """Note which kernel runs layers, by their public names."""
    EXECUTION.write(graph_module, execution_of(graph_module) | dict.fromkeys(layers, kernel))


def layer_of(node: Node | None) -> str:
    """The public name of a node's layer, else the node's own."""
    return "" if node is None else annotation_of(node).layer or node.name


def operation_of(graph_module: GraphModule, node: Node | None) -> str:
    """What a node does, for a person: the class of the module that it calls, or the name of the function."""
    if node is None:
        return "nothing"
    module = module_of(graph_module, node)
    name = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
    return f"'{name}'"


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Shape of the float32 or uint8 tensor that a node holds; None for everything else."""
    metadata = value.meta.get("tensor_meta") if isinstance(value, Node) else None
    is_known = isinstance(metadata, TensorMetadata) and metadata.dtype in (torch.float32, torch.uint8)
    return tuple(metadata.shape) if is_known else None  # type: ignore[union-attr]


def set_dtype(node: Node, dtype: torch.dtype) -> None:
    """Note that a node holds another dtype now."""
    metadata = node.meta.get("tensor_meta")
    if isinstance(metadata, TensorMetadata):
        node.meta["tensor_meta"] = metadata._replace(dtype=dtype)


def set_shape(node: Node, shape: tuple[int, ...], like: Node) -> None:
    """Note that a node holds a tensor of this shape; of the dtype of `like` where nothing was known of it.

    Args:
        node: the node.
        shape: the shape of the tensor that the node holds.
        like: a node whose dtype is taken where nothing was known of this one.
    """
    metadata = node.meta.get("tensor_meta", like.meta["tensor_meta"])
    node.meta["tensor_meta"] = metadata._replace(shape=torch.Size(shape))


def moves(node: Node | None) -> bool:
    """Whether a node only moves numbers around; None does not."""
    return (
        node is not None
        and node.op in ("call_method", "call_function")
        and node.target in _MOVES
        and input_of(node) is not None
    )


def factor_of(node: Node | None) -> float | None:
    """c of a node c x, c a number; None for everything else."""
    if node is None or node.target not in _PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[1] if isinstance(node.args[1], float) and input_of(node) is not None else None


def pads_zero(node: Node, code: ByteCode) -> bool:
    """Whether a node pads with zeros that the code has a byte for."""
    if node.target is not functional.pad or len(node.args) != 2 or not code.has_zero:
        return False
    mode, value = node.kwargs.get("mode", "constant"), node.kwargs.get("value")
    return bool(mode == "constant" and (value is None or value == 0))
