"""An fx graph as JSON and tensors, and back, without running anything that the file says.

Functions, methods, attributes and module classes are looked up in fixed tables (`allowlist`, `module_json`); names
that end up in the generated `forward` are checked to be names, and to be no name that stands for something else there;
a node may refer to earlier nodes only. That what a method is called on is a tensor, and that what is written to is not
the caller's, shows when shapes are propagated (`shape_check`).
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.shape_prop import TensorMetadata

from fxquant.artefact.allowlist import ATTRIBUTES, CODE_NAMES, FUNCTION_NAMES, FUNCTIONS, METHODS
from fxquant.artefact.argument_json import MOST_VALUES, value_to_json, values_from_json
from fxquant.artefact.module_json import module_from_json, module_to_json
from fxquant.artefact.operand_json import (
    OPERANDS,
    WITHOUT_OPERANDS,
    operand_to_json,
    operands_from_json,
    operands_of_before,
)
from fxquant.checks.untrusted import (
    NUMBER,
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
    take,
    whole,
)
from fxquant.errors import ArtefactError
from fxquant.graph.annotation import Annotation, Role, annotate, annotation_of
from fxquant.graph.facts import QUANTIZED, ROLES_ASSIGNED, TRACED, declare, facts_of
from fxquant.graph.notes import COVERAGE, IMAGE_SHAPE

_FACTS = {fact.name: fact for fact in (TRACED, ROLES_ASSIGNED, QUANTIZED)}
"""What a graph in a file can be said to be. Other facts are of candidates, observers and notes, which are not kept."""

# Names that files of earlier versions list besides; nothing in a file shows whether these hold, so they are dropped.
_FORMER_FACTS = (
    "folded", "observed", "calibrated", "Gram matrices known", "scales searched", "scored", "latency known",
    "bits allocated",
)  # fmt: skip
_ANNOTATED: dict[str, Rule] = {
    "role": choice(*map(str, Role)), "layer": TEXT, "block": whole(0, 10**6), "macs": whole()
}  # fmt: skip
_NOTES = {**_ANNOTATED, "operands": OPERANDS, **WITHOUT_OPERANDS}
_GRAPH = {
    "class": TEXT,
    "facts": listed(choice(*_FACTS, *_FORMER_FACTS)),
    "coverage": NUMBER,
    "image_shape": SHAPE,
    "modules": OBJECT,
    "nodes": listed(OBJECT, longest=10_000),
}
_GRAPH_OPTIONS = {"folds": listed(TEXT, longest=100)}  # earlier versions wrote it; nothing reads it
_NODE = {"name": TEXT, "op": TEXT, "target": TEXT}
_ANY = Rule("a value", lambda value: True)
_NODE_OPTIONS = {"args": listed(_ANY, 1000), "kwargs": OBJECT, "shape": SHAPE, "dtype": TEXT, "notes": OBJECT}
_MOST_MODULES = 10_000  # those that hold others counted in
_CALLS = ("call_function", "call_method", "call_module")


def graph_to_json(graph_module: GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON values and named tensors from which `graph_from_json` makes the same graph module.

    Kept: computation, names, roles, bits, costs, shapes, and whether the graph is traced, has roles and is quantized.
    Not kept: candidates, observers, what passes know besides, stack traces.
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
        "facts": sorted(fact.name for fact in facts_of(graph_module) & frozenset(_FACTS.values())),
        "coverage": 1.0 if (coverage := COVERAGE.get(graph_module)) is None else coverage,
        "image_shape": list(IMAGE_SHAPE.get(graph_module) or ()),
        "modules": modules,
        "nodes": [_node_to_json(node, index) for node in nodes],
    }
    return document, tensors


def graph_from_json(document: Any, tensors: Mapping[str, Tensor]) -> GraphModule:
    """The graph module, in inference mode, on the CPU. tensors: by name, as `graph_to_json` gave them.

    Raises ArtefactError for anything that is malformed, not allowed or does not fit together.
    """
    read = record(document, _GRAPH, "the graph", _GRAPH_OPTIONS)
    graph = Graph()
    nodes: list[Node] = []
    constants: dict[str, Any] = {}
    budget = [MOST_VALUES]
    for position, values in enumerate(read["nodes"]):
        nodes.append(_node_from_json(values, position, graph, nodes, budget))
        if nodes[-1].op == "get_attr":
            path = str(nodes[-1].target)
            if path not in constants:
                constants[path] = _constant(path, tensors, values)
    _check_structure(nodes, read["modules"], constants)
    contents = constants | {path: module_from_json(spec, path, tensors) for path, spec in read["modules"].items()}
    graph_module = _assemble(graph, contents, check_identifier(read["class"], "class"))
    declare(graph_module, [_FACTS[name] for name in read["facts"] if name in _FACTS])
    COVERAGE.write(graph_module, float(read["coverage"]))
    IMAGE_SHAPE.write(graph_module, tuple(read["image_shape"]))
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


def _constant(path: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Tensor:
    tensor = take(tensors, path)
    if "shape" in values and list(tensor.shape) != values["shape"]:
        raise ArtefactError(f"tensor '{path}' has shape {tuple(tensor.shape)}, its node says {values['shape']}")
    return tensor.clone()


def _check_structure(nodes: list[Node], modules: Mapping[str, Any], constants: Mapping[str, Tensor]) -> None:
    ops = [node.op for node in nodes]
    inputs = ops.count("placeholder")
    if ops.count("output") != 1 or ops[-1] != "output" or inputs == 0:
        raise ArtefactError("the graph does not have an input and exactly one output, as its last node")
    # The image first, then what has a default: arguments of the function that torch.fx writes.
    has_defaults = all(node.args and not node.all_input_nodes for node in nodes[1:inputs])
    if set(ops[:inputs]) != {"placeholder"} or nodes[0].args or not has_defaults:
        raise ArtefactError("the graph does not begin with its inputs: the image, and others that have a default")
    if len({node.target for node in nodes[:inputs]}) != inputs:
        raise ArtefactError("two inputs of the graph have the same name")
    paths = [check_path(path).split(".") for path in {*modules, *constants}]
    if len({tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}) > _MOST_MODULES:
        raise ArtefactError(f"the graph has more than {_MOST_MODULES} modules, which no model has")
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    for node in nodes:
        if node.op == "call_module" and node.target not in modules:
            raise ArtefactError(f"node {node.name} calls module '{node.target}', which the graph does not have")
    if unused := modules.keys() - called:
        raise ArtefactError(f"the graph has module '{min(unused):.100}', which no node calls")


def _node_to_json(node: Node, index: Mapping[Node, int]) -> dict[str, Any]:
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


def _node_from_json(values: Any, position: int, graph: Graph, nodes: list[Node], budget: list[int]) -> Node:
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
