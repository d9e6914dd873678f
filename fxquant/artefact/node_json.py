"""One node of an fx graph as JSON, and back: what it calls is looked up in fixed tables (`allowlist`)."""

from __future__ import annotations

import builtins
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.passes.shape_prop import TensorMetadata

from fxquant.artefact.allowlist import ATTRIBUTES, CODE_NAMES, FUNCTION_NAMES, FUNCTIONS, METHODS
from fxquant.artefact.argument_json import value_to_json, values_from_json
from fxquant.artefact.operand_json import (
    OPERANDS,
    WITHOUT_OPERANDS,
    operand_to_json,
    operands_from_json,
    operands_of_before,
)
from fxquant.checks.untrusted import (
    OBJECT,
    SHAPE,
    TEXT,
    Rule,
    check_identifier,
    check_path,
    check_variable,
    choice,
    dtype_named,
    listed,
    record,
    whole,
)
from fxquant.errors import ArtefactError
from fxquant.graph.annotation import Annotation, Role, annotate, annotation_of

_ANNOTATED: dict[str, Rule] = {
    "role": choice(*map(str, Role)), "layer": TEXT, "block": whole(0, 10**6), "macs": whole()
}  # fmt: skip
_NOTES = {**_ANNOTATED, "operands": OPERANDS, **WITHOUT_OPERANDS}
_NODE = {"name": TEXT, "op": TEXT, "target": TEXT}
_ANY = Rule("a value", lambda value: True)
_NODE_OPTIONS = {"args": listed(_ANY, 1000), "kwargs": OBJECT, "shape": SHAPE, "dtype": TEXT, "notes": OBJECT}
_CALLS = ("call_function", "call_method", "call_module")


def node_to_json(node: Node, index: Mapping[Node, int]) -> dict[str, Any]:
    """A node as JSON values. index: of every node, its place in the graph. Raises ArtefactError, naming the node."""
    where = f"node {node.name}"
    target: Any = node.target
    if node.op == "call_function":
        target = FUNCTION_NAMES.get(target, target)
    check_target(node.op, target, node.args, where)
    record: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
    if node.args:
        record["args"] = [value_to_json(value, index, where) for value in node.args]
    if node.kwargs:
        record["kwargs"] = {key: value_to_json(value, index, where) for key, value in node.kwargs.items()}
    metadata = node.meta.get("tensor_meta")
    if isinstance(metadata, TensorMetadata):
        record["shape"] = list(metadata.shape)
        if metadata.dtype != torch.float32:
            record["dtype"] = str(metadata.dtype).removeprefix("torch.")
    annotation, empty = annotation_of(node), Annotation()
    notes = {key: getattr(annotation, key) for key in _ANNOTATED}
    notes = {key: value for key, value in notes.items() if value != getattr(empty, key)}
    if annotation.operands:
        notes["operands"] = [operand_to_json(operand) for operand in annotation.operands]
    return record | ({"notes": notes} if notes else {})


def node_from_json(values: Any, position: int, graph: Graph, nodes: list[Node], budget: list[int]) -> Node:
    """Add a node to the graph.

    Args:
        values: its JSON value, as a file has it.
        position: its place in the graph.
        graph: becomes longer by it.
        nodes: those before it.
        budget: how many values the arguments of all nodes may still have, see `values_from_json`.

    Raises ArtefactError, naming the node.
    """
    read = record(values, _NODE, f"node {position}", _NODE_OPTIONS)
    name = check_variable(read["name"], "node name", CODE_NAMES)
    where = f"node {name}"
    op, target = read["op"], read["target"]
    given = read.get("kwargs", {})
    values = values_from_json([*read.get("args", []), *given.values()], nodes, where, budget)
    args = tuple(values[: len(values) - len(given)])
    names = (check_identifier(key, f"{where}: argument") for key in given)
    kwargs = dict(zip(names, values[len(args) :], strict=True))
    check_target(op, target, args, where)
    if op == "output" and (len(args) != 1 or kwargs):
        raise ArtefactError(f"{where} is an output of not exactly one value")
    if op in ("placeholder", "get_attr") and (kwargs or len(args) > (op == "placeholder")):
        raise ArtefactError(f"{where} is a {op} with arguments")
    # Functions of torch.nn that were recorded as they are give out=None, as normalize does.
    if kwargs.get("out") is not None or (op == "call_module" and kwargs):
        raise ArtefactError(f"{where} has arguments that graphs in files may not give: {sorted(kwargs)}")
    node = graph.create_node(op, FUNCTIONS[target] if op == "call_function" else target, args, kwargs, name=name)
    if node.name != name:
        raise ArtefactError(f"{where}: the name is there twice or reserved")
    if "shape" in read:
        shape = torch.Size(read["shape"])
        dtype = dtype_named(read.get("dtype", "float32"), where)
        stride = tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))
        node.meta["tensor_meta"] = TensorMetadata(shape, dtype, False, stride, None, False, {})
    if "notes" in read:
        _annotate(node, record(read["notes"], {}, f"{where}: notes", _NOTES), where)
    return node


def _annotate(node: Node, notes: dict[str, Any], where: str) -> None:
    """Write what a file says of a node, by fields of its annotation or as files said it before there were operands."""
    kept = {name: value for name, value in notes.items() if name in _ANNOTATED}
    role = Role(notes["role"]) if "role" in notes else None
    if "operands" in notes:
        operands = operands_from_json(notes["operands"], where)
    else:
        operands = operands_of_before(notes, role) if notes.keys() & WITHOUT_OPERANDS.keys() else ()
    annotate(node, **{**kept, "role": role, "operands": operands})


def check_target(op: str, target: Any, args: tuple[Any, ...], where: str) -> None:
    """Raise ArtefactError, naming `where` and the target, unless a node may call or read it.

    Args:
        op: the node's op, as torch.fx has it.
        target: for functions the name in the allowlist.
        args: the node's arguments.
        where: the node, for the message.
    """
    if op == "call_function" and target not in FUNCTIONS:
        raise ArtefactError(
            f"{where} calls {target!r}, which graphs in files may not call: use a torch function from "
            "fxquant/artefact/allowlist.py, or add it there"
        )
    if op == "call_method" and target not in METHODS:
        raise ArtefactError(f"{where} calls the method {target!r}, which is not in fxquant/artefact/allowlist.py")
    is_getattr = op == "call_function" and FUNCTIONS[target] is builtins.getattr
    if is_getattr and not (len(args) == 2 and type(args[1]) is str and args[1] in ATTRIBUTES):
        raise ArtefactError(f"{where} reads the attribute {args[1:]!r}; graphs in files may read {sorted(ATTRIBUTES)}")
    if op in ("call_module", "get_attr"):
        check_path(target)
    elif op == "placeholder":
        check_variable(target, f"{where}: target", CODE_NAMES)
    elif op == "output":
        check_identifier(target, f"{where}: target")
    elif op not in _CALLS:
        raise ArtefactError(f"{where} has the unknown op {op!r}")
