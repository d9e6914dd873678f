"""Graphs as text, one line per node: for golden tests and for error messages.

`%blocks_3_mlp_fc1 = fc1[w4a5](%blocks_3_norm2)`: a node's name, what it does (its role, else its operation), its bits
where annotated, its inputs.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxquant.graph.annotation import annotation_of, input_label


def format_graph(graph_module: fx.GraphModule) -> str:
    """The whole graph, one `describe` line per node, in graph order, without a newline at the end."""
    return "\n".join(describe(node) for node in graph_module.graph.nodes)


def describe(node: fx.Node) -> str:
    """One node: `%add_1 = add(%x, %y)`; with a role, `%head = head[w8a8](%norm)`; tensors and numbers in order."""
    if node.op == "placeholder":
        return f"%{node.name} = image()"
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    if node.op == "get_attr":
        return f"%{node.name} = constant({node.target})"
    keywords = [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    arguments = ", ".join([*map(_argument, node.args), *keywords])
    return f"%{node.name} = {_operation(node)}{_bits(node)}({arguments})"


def _operation(node: fx.Node) -> str:
    role = annotation_of(node).role
    if role is not None:
        return str(role)
    if node.op == "call_module" and node.graph.owning_module is not None:
        return type(node.graph.owning_module.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _bits(node: fx.Node) -> str:
    """[w4a5], [a8] without weight bits, [a2x4] of two inputs, [w4] with float ones, nothing where none has bits."""
    annotation = annotation_of(node)
    weight, inputs = annotation.weight_bits, annotation.input_bits
    parts = ["" if weight is None else f"w{weight}", f"a{input_label(inputs)}" if any(inputs) else ""]
    return f"[{''.join(parts)}]" if any(parts) else ""


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_argument, value))})"
    if isinstance(value, slice):
        parts = ["" if part is None else _argument(part) for part in (value.start, value.stop)]
        return ":".join(parts) + ("" if value.step is None else f":{_argument(value.step)}")
    return "..." if value is Ellipsis else repr(value)
