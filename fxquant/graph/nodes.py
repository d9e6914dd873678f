"""What a node of a graph is: its arguments, its shape, where it came from, whether it moves data."""

from __future__ import annotations

import copy
import operator
import re
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import TensorMetadata
from torch.nn import functional

_METHODS = frozenset(
    {
        "view", "reshape", "permute", "transpose", "contiguous", "flatten", "unflatten", "roll", "mean", "unsqueeze",
        "squeeze", "clone", "select", "narrow", "expand", "swapaxes", "movedim",
    }
)  # fmt: skip
_FUNCTIONS = frozenset(
    {
        operator.getitem, functional.pad, torch.roll, torch.flatten, torch.reshape,
        torch.permute, torch.transpose, torch.mean, torch.unsqueeze, torch.squeeze, torch.movedim, torch.select,
        torch.narrow, torch.clone,
    }
)  # fmt: skip


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name.

    Args:
        node: the call.
        position: index of the argument where it is given by position.
        name: name of the argument where it is given by name.
        default: what is returned where it is not given.
    """
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def image_of(graph_module: GraphModule) -> Node:
    """The node that stands for the images."""
    return next(node for node in graph_module.graph.nodes if node.op == "placeholder")  # type: ignore[no-any-return]


def tensor_at(graph_module: GraphModule, node: Node) -> torch.Tensor:
    """The tensor that a `get_attr` node stands for."""
    return tensor_named(graph_module, str(node.target))


def tensor_named(module: nn.Module, path: str) -> torch.Tensor:
    """The parameter or buffer at a path below a module."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)  # type: ignore[no-any-return]


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its first parameter or buffer is; the CPU where it has none."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def on_cpu(graph_module: GraphModule) -> GraphModule:
    """The graph on the CPU: itself where it is there, else a copy."""
    return graph_module if device_of(graph_module).type == "cpu" else copy.deepcopy(graph_module).cpu()


def constant_of(graph_module: GraphModule, value: Any) -> torch.Tensor | None:
    """The tensor behind a `get_attr` node, None for anything else."""
    if not isinstance(value, Node) or value.op != "get_attr":
        return None
    return tensor_at(graph_module, value)


def constants_by_path(graph_module: GraphModule) -> dict[str, torch.Tensor]:
    """The tensors that a graph reads itself, by their paths."""
    return {str(n.target): tensor_at(graph_module, n) for n in graph_module.graph.nodes if n.op == "get_attr"}


def scope_of(node: Node) -> str:
    """Path of the module whose code made the node, "" for the model itself."""
    scope = str(next(reversed(node.meta.get("nn_module_stack") or {"": None})))
    return re.sub(r"@\d+$", "", scope)  # torch.fx counts the calls of a module so


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Shape of the tensor a node holds, None where it holds something else."""
    found = value.meta.get("tensor_meta") if isinstance(value, Node) else None
    return tuple(found.shape) if isinstance(found, TensorMetadata) else None


def elements_of(node: Node) -> int:
    """Elements that a node holds for one image; a constant is the same for every image."""
    elements = int(node.meta["tensor_meta"].shape.numel())
    batch_size = image_of(node.graph.owning_module).meta["tensor_meta"].shape[0]  # type: ignore[arg-type]
    return elements if elements % batch_size or node.op == "get_attr" else elements // int(batch_size)


def moves_data(node: Node) -> bool:
    """Whether a node only moves, drops, repeats or averages values."""
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_function" and node.target in _FUNCTIONS


def reads_shape(node: Node) -> bool:
    """Whether a node reads a tensor's shape, or where it is, and not its values."""
    attributes = (("shape",), ("ndim",), ("device",))
    return node.target in ("size", "dim") or (node.target is getattr and node.args[1:2] in attributes)


def module_uses(graph_module: GraphModule) -> dict[str, int]:
    """How often each module is called, or a tensor of it read, by target."""
    counts: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            target = str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
            counts[target] = counts.get(target, 0) + 1
    return counts


def module_of(graph_module: GraphModule, node: Node | None) -> nn.Module | None:
    """The module that a node calls, None where it calls none."""
    is_call = node is not None and node.op == "call_module"
    return graph_module.get_submodule(str(node.target)) if node is not None and is_call else None


def readers(node: Node) -> list[Node]:
    """Users of a node that read its numbers, not only its shape."""
    return [user for user in node.users if not reads_shape(user)]


def input_of(node: Node | None, index: int = 0) -> Node | None:
    """The node that an argument of a node is, None where it is something else."""
    found = node.args[index] if node is not None and len(node.args) > index else None
    return found if isinstance(found, Node) else None


def only_reader(node: Node | None) -> Node | None:
    """The one user that reads a node's numbers, None where there are several or none."""
    found = [] if node is None else readers(node)
    return found[0] if len(found) == 1 else None
