"""Where modules stand in a graph module: free names for new ones, and new ones in the place of old ones.

`GraphModule.add_submodule` replaces what stands at a path, and says nothing. Every module and buffer that is added goes
through here, so two never meet at one path, whatever the model's author called things, and no path is one that an
artefact would refuse.
"""

from __future__ import annotations

import copy
import itertools
import keyword
import re
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

_RESERVED = frozenset(dir(GraphModule)) | {"graph", "training", "meta", "shape_env"}
_NAME = re.compile(r"[A-Za-z0-9_]+")


def free_name(owner: nn.Module, wanted: str) -> str:
    """`wanted`, or the first of `wanted_1`, `wanted_2`, ... that is no attribute of the module yet.

    The result has letters, digits and `_` only and is no keyword and no name of `torch.fx.GraphModule`.
    """
    stem = re.sub(r"[^A-Za-z0-9_]", "_", wanted)
    stem = f"_{stem.strip('_')}" if not stem or stem.startswith("__") else stem
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(1)))
    return next(name for name in names if _is_valid(name) and not _is_taken(owner, name))


def _is_valid(name: str) -> bool:
    """Whether generated code and artefacts can have it."""
    is_name = _NAME.fullmatch(name) is not None and not name.startswith("__")
    return is_name and not keyword.iskeyword(name) and name not in _RESERVED


def _is_taken(owner: nn.Module, name: str) -> bool:
    """Whether a module has an attribute; its own `__getattr__` is not asked, which may have any."""
    places = (owner._modules, owner._parameters, owner._buffers, vars(owner))
    return any(name in place for place in places) or hasattr(type(owner), name)


def free_path(graph_module: GraphModule, wanted: str) -> str:
    """`wanted`, a path such as `blocks.0.attn.qk`, or one like it at which nothing stands yet, see `free_name`."""
    owner: nn.Module = graph_module
    *parents, last = wanted.split(".")
    for index, part in enumerate(parents):
        child = owner._modules.get(part) if _is_valid(part) else None
        if child is None:  # everything below a new module is free
            return ".".join([*parents[:index], free_name(owner, part), *_names(wanted, index + 1)])
        owner = child
    return ".".join([*parents, free_name(owner, last)])


def add_module(graph_module: GraphModule, wanted: str, module: nn.Module) -> str:
    """Add a module at `wanted`, or where that is taken at a path like it; returns the path.

    Args:
        graph_module: the graph module that the module becomes part of.
        wanted: the path that the module gets where nothing stands there.
        module: the module.
    """
    path = free_path(graph_module, wanted)
    graph_module.add_submodule(path, module)
    return path


def exchange_module(graph_module: GraphModule, node: Node, module: nn.Module) -> None:
    """Let a node call another module: in the old one's place, or beside it where another node needs the old one.

    Another node needs it that calls it, calls a module in it or reads a tensor of it, as tied weights are read.

    Args:
        graph_module: the graph that the node belongs to.
        node: a call_module node.
        module: what the node calls from now on.
    """
    path = str(node.target)
    others = (str(n.target) for n in node.graph.nodes if n is not node and n.op in ("call_module", "get_attr"))
    if any(other == path or other.startswith(f"{path}.") for other in others):
        node.target = add_module(graph_module, path, module)
    else:
        graph_module.add_submodule(path, module)


def with_valid_names(root: nn.Module, graph: Graph) -> Graph:
    """Rename what neither generated code nor artefacts can hold: modules called `class`, `a-b`, `graph` or the like.

    root: what the graph's targets are in. Both are changed.
    """
    names: dict[tuple[nn.Module, str], str] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        owner, parts = root, []
        for part in str(node.target).split("."):
            if (owner, part) not in names:
                names[owner, part] = part if _is_valid(part) else _renamed(owner, part)
            parts.append(names[owner, part])
            child = owner._modules.get(parts[-1])
            owner = owner if child is None else child
        node.target = ".".join(parts)
    return graph


def _renamed(owner: nn.Module, name: str) -> str:
    """Give a module, parameter or buffer a free name in its owner; returns it."""
    free = free_name(owner, name)
    tables: tuple[dict[str, Any], ...] = (owner._modules, owner._parameters, owner._buffers)
    for table in tables:
        if name in table:
            table[free] = table.pop(name)
    return free


def separate_calls(graph_module: GraphModule) -> None:
    """Give every call but the first of a module that is called several times a copy of its own, beside it.

    Each call is then a layer like any other: passes may fold into it, quantize its input and round its weights without
    a thought for the others. So a weight that n layers share counts n times in a budget, as it does in the file.
    """
    called = set()
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target in called:
            module = graph_module.get_submodule(str(node.target))
            node.target = add_module(graph_module, str(node.target), copy.deepcopy(module))
        if node.op == "call_module":
            called.add(node.target)


def _names(wanted: str, start: int) -> list[str]:
    """The parts of a path from `start` on, each a name that a new module is free to have."""
    return [free_name(nn.Module(), part) for part in wanted.split(".")[start:]]
