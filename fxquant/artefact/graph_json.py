"""An fx graph as JSON and tensors, and back, without running anything that the file says.

Functions, methods, attributes and module classes are looked up in fixed tables (`allowlist`, `module_json`); names
that end up in the generated `forward` are checked to be names, and to be no name that stands for something else there;
a node may refer to earlier nodes only. That what a method is called on is a tensor, and that what is written to is not
the caller's, shows when shapes are propagated (`shape_check`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxquant.artefact.argument_json import MOST_VALUES
from fxquant.artefact.module_json import module_from_json, module_to_json
from fxquant.artefact.node_json import node_from_json, node_to_json
from fxquant.checks.untrusted import (
    NUMBER,
    OBJECT,
    SHAPE,
    TEXT,
    check_identifier,
    check_path,
    choice,
    listed,
    record,
    take,
)
from fxquant.errors import ArtefactError
from fxquant.graph.facts import QUANTIZED, ROLES_ASSIGNED, TRACED, declare, facts_of
from fxquant.graph.nodes import tensor_named
from fxquant.graph.notes import COVERAGE, IMAGE_SHAPE
from fxquant.graph.output_tree import TENSOR, TREE, Tree, leaves

MOST_SIZES = 16
"""Graphs for other image sizes that one file may have."""
Size = tuple[int, int]

_FACTS = {fact.name: fact for fact in (TRACED, ROLES_ASSIGNED, QUANTIZED)}
"""What a graph in a file can be said to be. Other facts are of candidates, observers and notes, which are not kept."""

# Names that files of earlier versions list besides; nothing in a file shows whether these hold, so they are dropped.
_FORMER_FACTS = (
    "folded", "observed", "calibrated", "Gram matrices known", "scales searched", "scored", "latency known",
    "bits allocated",
)  # fmt: skip
_NODES = listed(OBJECT, longest=10_000)
_GRAPH = {
    "class": TEXT,
    "facts": listed(choice(*_FACTS, *_FORMER_FACTS)),
    "coverage": NUMBER,
    "image_shape": SHAPE,
    "modules": OBJECT,
    "nodes": _NODES,
}
_SIZE = {"image_shape": SHAPE, "nodes": _NODES}
_GRAPH_OPTIONS = {
    "sizes": listed(OBJECT, longest=MOST_SIZES),  # graphs of the same modules for images of other sizes
    "folds": listed(TEXT, longest=100),  # earlier versions wrote it; nothing reads it
    "output": OBJECT,  # how the tensors that the graph returns are arranged; without it, it returns one
}
_MOST_MODULES = 10_000  # those that hold others counted in


def graph_to_json(
    graph_module: GraphModule, sizes: Mapping[Size, GraphModule] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON values and named tensors from which `graphs_from_json` makes the same graph modules.

    Args:
        graph_module: the graph of the main image size.
        sizes: by (height, width), graphs for images of other sizes, which call the same modules.

    Kept: computation, names, roles, bits, costs, shapes, and whether the graph is traced, has roles and is quantized.
    Not kept: candidates, observers, what passes know besides, stack traces.
    Raises ArtefactError, naming the node, for calls that are not allowed and values that cannot be kept.
    """
    modules: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    others = [
        {"image_shape": list(IMAGE_SHAPE.of(other)), "nodes": _nodes_to_json(other, modules, tensors)}
        for other in (sizes or {}).values()
    ]
    document = {
        "class": type(graph_module).__name__,
        "facts": sorted(fact.name for fact in facts_of(graph_module) & frozenset(_FACTS.values())),
        "coverage": 1.0 if (coverage := COVERAGE.get(graph_module)) is None else coverage,
        "image_shape": list(IMAGE_SHAPE.get(graph_module) or ()),
        "nodes": _nodes_to_json(graph_module, modules, tensors),
        "modules": modules,
        **({} if (tree := TREE.get(graph_module)) is None else {"output": tree}),
        **({"sizes": others} if others else {}),
    }
    return document, tensors


def _nodes_to_json(
    graph_module: GraphModule, modules: dict[str, Any], tensors: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """A graph's nodes; what they call and read is added to the modules and tensors."""
    nodes = list(graph_module.graph.nodes)
    for node in nodes:
        target = str(node.target)
        if node.op == "call_module" and target not in modules:
            modules[target], state = module_to_json(graph_module.get_submodule(check_path(target)), target)
            tensors |= state
        elif node.op == "get_attr":
            tensors[target] = tensor_named(graph_module, check_path(target))
    index = {node: position for position, node in enumerate(nodes)}
    return [node_to_json(node, index) for node in nodes]


def graph_from_json(document: Any, tensors: Mapping[str, Tensor]) -> GraphModule:
    """The graph module of the main image size alone, see `graphs_from_json`."""
    return graphs_from_json(document, tensors)[0]


def graphs_from_json(document: Any, tensors: Mapping[str, Tensor]) -> tuple[GraphModule, dict[Size, GraphModule]]:
    """The graph module, in inference mode, on the CPU; and by (height, width) those of other image sizes.

    tensors: by name, as `graph_to_json` gave them. The graphs call the same modules, and hold the same constants.

    Raises ArtefactError for anything that is malformed, not allowed or does not fit together.
    """
    read = record(document, _GRAPH, "the graph", _GRAPH_OPTIONS)
    sizes = [record(values, _SIZE, "a graph of another image size") for values in read.get("sizes", [])]
    constants: dict[str, Any] = {}
    budget = [MOST_VALUES]
    graphs = [_graph_from_json(values["nodes"], constants, tensors, budget) for values in (read, *sizes)]
    every_node = [node for graph in graphs for node in graph.nodes]
    _check_modules(every_node, read["modules"], constants)
    contents = constants | {path: module_from_json(spec, path, tensors) for path, spec in read["modules"].items()}
    pairs = zip(graphs, (read, *sizes), strict=True)
    main, *others = [_finished(graph, contents, read, values) for graph, values in pairs]
    by_size = {(shape[1], shape[2]): other for other in others if len(shape := IMAGE_SHAPE.of(other)) == 3}
    channels, *own = IMAGE_SHAPE.of(main) or (0,)
    if len(by_size) < len(others) or tuple(own) in by_size or any(IMAGE_SHAPE.of(o)[0] != channels for o in others):
        raise ArtefactError("the graphs of other image sizes are not each of another height and width")
    return main, by_size


def _graph_from_json(
    document: list[Any], constants: dict[str, Any], tensors: Mapping[str, Tensor], budget: list[int]
) -> Graph:
    """The graph of some nodes; the constants that it reads are added to those known."""
    graph = Graph()
    nodes: list[Node] = []
    for position, values in enumerate(document):
        nodes.append(node_from_json(values, position, graph, nodes, budget))
        if nodes[-1].op == "get_attr":
            path = str(nodes[-1].target)
            if path not in constants:
                constants[path] = _constant(path, tensors, values)
    _check_structure(nodes)
    return graph


def _finished(
    graph: Graph, contents: dict[str, Any], document: Mapping[str, Any], size: Mapping[str, Any]
) -> GraphModule:
    """The graph with its modules, and what the file says of it.

    Args:
        graph: of one image size.
        contents: modules and constants by path.
        document: what all graphs of the file have in common.
        size: with the shape of its images.
    """
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    own = {path: content for path, content in contents.items() if path in used}
    graph_module = _assemble(graph, own, check_identifier(document["class"], "class"))
    declare(graph_module, [_FACTS[name] for name in document["facts"] if name in _FACTS])
    COVERAGE.write(graph_module, float(document["coverage"]))
    IMAGE_SHAPE.write(graph_module, tuple(size["image_shape"]))
    tree = _checked_tree(document.get("output", {TENSOR: 0}), graph.output_node().args[0])
    if not tree.is_bare:
        TREE.write(graph_module, tree.to_json())
    return graph_module.eval()


def _checked_tree(document: Any, returned: Any) -> Tree:
    """The output's tree, which has a place for every tensor that the graph returns."""
    tree = Tree.from_json(document)
    places, count = len(tree.names), len(leaves(returned))
    if places != count or tree.is_bare == isinstance(returned, tuple | list):
        raise ArtefactError(f"the graph returns {count} tensors, and its output has places for {places}")
    return tree


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


def _check_structure(nodes: list[Node]) -> None:
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


def _check_modules(nodes: list[Node], modules: Mapping[str, Any], constants: Mapping[str, Tensor]) -> None:
    """Raise ArtefactError unless nodes, of all graphs together, call the modules that there are."""
    paths = [check_path(path).split(".") for path in {*modules, *constants}]
    if len({tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}) > _MOST_MODULES:
        raise ArtefactError(f"the graph has more than {_MOST_MODULES} modules, which no model has")
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    for node in nodes:
        if node.op == "call_module" and node.target not in modules:
            raise ArtefactError(f"node {node.name} calls module '{node.target}', which the graph does not have")
    if unused := modules.keys() - called:
        raise ArtefactError(f"the graph has module '{min(unused):.100}', which no node calls")
