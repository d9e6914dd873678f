"""An fx graph as JSON and tensors, and back, without running anything that the file says.

Functions, methods, attributes and module classes are looked up in fixed tables (`allowlist`, `module_json`); names
that end up in the generated `forward` are checked to be names; a node may refer to earlier nodes only.

Argument values: None, bool, int, finite float, str and lists are themselves; everything else is an object with one
key: {"node": index}, {"tuple": [...]}, {"dict": [[key, value], ...]}, {"slice": [start, stop, step]},
{"float": "inf"}, {"dtype": "float32"}, {"device": "cpu"}, {"format": "channels_last"}, {"ellipsis": true}.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.shape_prop import TensorMetadata

from fxquant.errors import ArtefactError
from fxquant.graph.annotation import (
    Annotation,
    Fact,
    Role,
    annotate,
    annotation_of,
    declare,
    facts_of,
    folds_of,
    note_fold,
)
from fxquant.runtime.allowlist import ATTRIBUTES, FUNCTION_NAMES, FUNCTIONS, METHODS
from fxquant.runtime.module_json import module_from_json, module_to_json
from fxquant.runtime.untrusted import check_identifier, check_path, dtype_named, field, sizes, take

_FORMATS = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.memory_format)
}
_ANNOTATED: dict[str, type] = {
    "layer": str, "block": int, "parameters": int, "macs": int, "activation_elements": int, "left_elements": int,
    "weight_bits": int, "activation_bits": int, "left_bits": int, "pinned": bool,
}  # fmt: skip
_CALLS = ("call_function", "call_method", "call_module")


def graph_to_json(graph_module: GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON values and named tensors from which `graph_from_json` makes the same graph module.

    Kept: computation, names, roles, bits, costs, shapes, facts. Not kept: candidates, observers, stack traces.
    Raises ArtefactError, naming the node, for calls that are not allowed and values that cannot be kept.
    """
    nodes = list(graph_module.graph.nodes)
    index = {node: position for position, node in enumerate(nodes)}
    modules: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for node in nodes:
        target = str(node.target)
        if node.op == "call_module" and target not in modules:
            modules[target], state = module_to_json(graph_module.get_submodule(check_path(target)), target)
            tensors |= state
        elif node.op == "get_attr":
            owner, _, name = check_path(target).rpartition(".")
            tensors[target] = getattr(graph_module.get_submodule(owner), name)
    document = {
        "class": type(graph_module).__name__,
        "facts": sorted(facts_of(graph_module)),
        "folds": folds_of(graph_module),
        "coverage": float(graph_module.meta.get("coverage", 1.0)),
        "image_shape": list(graph_module.meta.get("image_shape", ())),
        "modules": modules,
        "nodes": [_node_to_json(node, index) for node in nodes],
    }
    return document, tensors


def graph_from_json(document: Any, tensors: Mapping[str, Tensor]) -> GraphModule:
    """The graph module, in inference mode, on the CPU. tensors: by name, as `graph_to_json` gave them.

    Raises ArtefactError for anything that is malformed, not allowed or does not fit together.
    """
    contents: dict[str, Any] = {}
    for path, spec in field(document, "modules", dict, "the graph").items():
        contents[path] = module_from_json(spec, check_path(path), tensors)
    graph = Graph()
    nodes: list[Node] = []
    for position, record in enumerate(field(document, "nodes", list, "the graph")):
        nodes.append(_node_from_json(record, position, graph, nodes))
        if nodes[-1].op == "get_attr":
            path = str(nodes[-1].target)
            contents.setdefault(path, _constant(path, tensors, record))
    _check_structure(nodes, contents)
    graph_module = _assemble(graph, contents, check_identifier(field(document, "class", str, "the graph"), "class"))
    try:
        facts = frozenset(Fact(name) for name in field(document, "facts", list, "the graph"))
    except ValueError as error:
        raise ArtefactError(f"the graph declares an unknown fact: {error}") from error
    declare(graph_module, facts)
    for name in field(document, "folds", list, "the graph", []):
        note_fold(graph_module, check_identifier(name, "a fold's name"))
    graph_module.meta["coverage"] = field(document, "coverage", float, "the graph")
    graph_module.meta["image_shape"] = sizes(field(document, "image_shape", list, "the graph"), "image_shape")
    return graph_module.eval()


def _assemble(graph: Graph, contents: dict[str, Any], class_name: str) -> GraphModule:
    root = nn.Module()
    try:
        for path in sorted(contents, key=lambda path: (isinstance(contents[path], Tensor), path.count("."))):
            _place(root, path, contents[path])
        graph_module = GraphModule(root, graph, class_name=class_name)
        graph_module.graph.lint()
    # Clashing paths (a tensor where a module must be), reserved names in the signature: the file is at fault.
    except Exception as error:
        raise ArtefactError(f"the graph does not fit together: {error}") from error
    return graph_module


def _place(owner: nn.Module, path: str, content: nn.Module | Tensor) -> None:
    """Put a module or tensor at its path; a tensor that a module there already has stays the module's."""
    *parents, last = path.split(".")
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(content, nn.Module):
        owner.add_module(last, content)
    elif last not in owner._parameters and last not in owner._buffers:
        owner.register_buffer(last, content)


def _constant(path: str, tensors: Mapping[str, Tensor], record: Any) -> Tensor:
    tensor = take(tensors, path)
    if "shape" in record and tuple(tensor.shape) != tuple(record["shape"]):
        raise ArtefactError(f"tensor '{path}' has shape {tuple(tensor.shape)}, its node says {record['shape']}")
    return tensor.clone()


def _check_structure(nodes: list[Node], contents: dict[str, Any]) -> None:
    ops = [node.op for node in nodes]
    if ops.count("output") != 1 or ops[-1] != "output" or "placeholder" not in ops:
        raise ArtefactError("the graph does not have an input and exactly one output, as its last node")
    for node in nodes:
        if node.op == "call_module" and not isinstance(contents.get(str(node.target)), nn.Module):
            raise ArtefactError(f"node {node.name} calls module '{node.target}', which the graph does not have")


def _node_to_json(node: Node, index: Mapping[Node, int]) -> dict[str, Any]:
    where = f"node {node.name}"
    target: Any = node.target
    if node.op == "call_function":
        target = FUNCTION_NAMES.get(target, target)
    check_target(node.op, target, node.args, where)
    record: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
    if node.args:
        record["args"] = [_value_to_json(value, index, where) for value in node.args]
    if node.kwargs:
        record["kwargs"] = {key: _value_to_json(value, index, where) for key, value in node.kwargs.items()}
    metadata = node.meta.get("tensor_meta")
    if isinstance(metadata, TensorMetadata):
        record["shape"] = list(metadata.shape)
        if metadata.dtype != torch.float32:
            record["dtype"] = str(metadata.dtype).removeprefix("torch.")
    annotation, empty = annotation_of(node), Annotation()
    notes = {key: getattr(annotation, key) for key in ("role", *_ANNOTATED)}
    notes = {key: value for key, value in notes.items() if value != getattr(empty, key)}
    return record | ({"notes": notes} if notes else {})


def _node_from_json(record: Any, position: int, graph: Graph, nodes: list[Node]) -> Node:
    name = check_identifier(field(record, "name", str, f"node {position}"), "node name")
    where = f"node {name}"
    op, target = field(record, "op", str, where), field(record, "target", str, where)
    args = tuple(_value_from_json(value, nodes, where) for value in field(record, "args", list, where, []))
    kwargs = {
        check_identifier(key, f"{where}: argument"): _value_from_json(value, nodes, where)
        for key, value in field(record, "kwargs", dict, where, {}).items()
    }
    check_target(op, target, args, where)
    if op == "output" and (len(args) != 1 or kwargs):
        raise ArtefactError(f"{where} is an output of not exactly one value")
    node = graph.create_node(op, FUNCTIONS[target] if op == "call_function" else target, args, kwargs, name=name)
    if node.name != name:
        raise ArtefactError(f"{where}: the name is there twice or reserved")
    if "shape" in record:
        shape = torch.Size(sizes(record["shape"], where))
        dtype = dtype_named(record.get("dtype", "float32"), where)
        stride = tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))
        node.meta["tensor_meta"] = TensorMetadata(shape, dtype, False, stride, None, False, {})
    if "notes" in record:
        annotate(node, **_notes(field(record, "notes", dict, where), where))
    return node


def _notes(notes: Any, where: str) -> dict[str, Any]:
    known = {key: field(notes, key, kind, where) for key, kind in _ANNOTATED.items() if key in notes}
    if any(value < 0 for value in known.values() if type(value) is int):
        raise ArtefactError(f"{where}: an annotation is negative: {known}")
    if "role" in notes:
        if notes["role"] not in [str(role) for role in Role]:
            raise ArtefactError(f"{where} has the unknown role {notes['role']!r}")
        known["role"] = Role(notes["role"])
    return known


def check_target(op: str, target: Any, args: tuple[Any, ...], where: str) -> None:
    """Raise ArtefactError, naming `where` and the target, unless a node may call or read it.

    target: for functions the name in the allowlist.
    """
    if op == "call_function" and target not in FUNCTIONS:
        raise ArtefactError(
            f"{where} calls {target!r}, which graphs in files may not call: use a torch function from "
            "fxquant/runtime/allowlist.py, or add it there"
        )
    if op == "call_method" and target not in METHODS:
        raise ArtefactError(f"{where} calls the method {target!r}, which is not in fxquant/runtime/allowlist.py")
    is_getattr = op == "call_function" and FUNCTIONS[target] is builtins.getattr
    if is_getattr and not (len(args) == 2 and type(args[1]) is str and args[1] in ATTRIBUTES):
        raise ArtefactError(f"{where} reads the attribute {args[1:]!r}; graphs in files may read {sorted(ATTRIBUTES)}")
    if op in ("call_module", "get_attr"):
        check_path(target)
    elif op in ("placeholder", "output"):
        check_identifier(target, f"{where}: target")
    elif op not in _CALLS:
        raise ArtefactError(f"{where} has the unknown op {op!r}")


def _value_to_json(value: Any, index: Mapping[Node, int], where: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Node):
        return {"node": index[value]}
    if isinstance(value, tuple | list):
        items = [_value_to_json(item, index, where) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": [[_value_to_json(part, index, where) for part in item] for item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_value_to_json(part, index, where) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype | torch.memory_format):
        kind = "dtype" if isinstance(value, torch.dtype) else "format"
        return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is ...:
        return {"ellipsis": True}
    raise ArtefactError(f"{where} has an argument of type {type(value).__name__}, which cannot be kept: {value!r}")


def _value_from_json(value: Any, nodes: list[Node], where: str) -> Any:
    if type(value) is list:
        return [_value_from_json(item, nodes, where) for item in value]
    if type(value) is not dict:
        return value
    try:
        ((kind, content),) = value.items()
        return _TAGGED[kind](content, nodes, where)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ArtefactError(f"{where} has an argument that cannot be read: {value!r:.200}: {error}") from error


def _earlier(position: Any, nodes: list[Node], where: str) -> Node:
    if type(position) is not int or not 0 <= position < len(nodes):
        raise ArtefactError(f"{where} refers to node {position!r}; only the {len(nodes)} nodes before it exist there")
    return nodes[position]


def _items(values: Any, nodes: list[Node], where: str) -> tuple[Any, ...]:
    if type(values) is not list:
        raise ArtefactError(f"{where} has {values!r:.200} where a list belongs")
    return tuple(_value_from_json(item, nodes, where) for item in values)


def _slice(values: Any, nodes: list[Node], where: str) -> slice:
    start, stop, step = _items(values, nodes, where)
    return slice(start, stop, step)


_TAGGED: dict[str, Callable[[Any, list[Node], str], Any]] = {
    "node": _earlier,
    "tuple": _items,
    "slice": _slice,
    "dict": lambda pairs, nodes, where: dict(_items(pair, nodes, where) for pair in pairs),
    "float": lambda text, nodes, where: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[text],
    "dtype": lambda text, nodes, where: dtype_named(text, where),
    "device": lambda text, nodes, where: torch.device(text),
    "format": lambda text, nodes, where: _FORMATS[text],
    "ellipsis": lambda flag, nodes, where: ...,
}
