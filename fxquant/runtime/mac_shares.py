"""Which share of a model's multiply-accumulates runs in float, counted from the graph, whatever the reason.

Counted is every node that multiplies tensors with one another and sums: linear layers, convolutions (transposed too),
matrix products in every spelling, einsum, fused attention, bilinear layers. In float runs what does not have both of
its operands quantized: attention in a spelling that no pass knows as well as a layer that was left out on purpose.
For one image, at the traced size. Elementwise products, norms, softmax and activations are not counted.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from fxquant.errors import ArtefactError
from fxquant.graph.annotation import annotation_of
from fxquant.graph.nodes import argument, image_of, module_of, scope_of, shape_of
from fxquant.runtime.layer_row import LayerRow
from fxquant.runtime.simulated import QuantizedMatmul, QuantizedWeightModule

LISTED = 5  # of the largest nodes in float
_SHARES = ("float_share", "integer_share", "simulated_share")
_MATMULS = {
    operator.matmul, torch.matmul, torch.bmm, torch.mm, torch.mv, torch.dot, torch.linalg.multi_dot,
    "matmul", "bmm", "mm", "mv", "dot", "__matmul__", "__rmatmul__",
}  # fmt: skip
_ADDED_MATMULS = {torch.addmm, torch.baddbmm, torch.addbmm, torch.addmv, "addmm", "baddbmm", "addbmm", "addmv"}
_CONVOLUTIONS = {functional.conv1d, functional.conv2d, functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
_TRANSPOSED = {
    functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip


def mac_shares(graph_module: GraphModule) -> dict[str, Any]:
    """JSON values of a simulated graph with shapes.

    `total`: multiply-accumulates of one image. `float_share`: 0 to 1, of those without both operands quantized.
    `largest_in_float`: [{"node", "share"}], at most LISTED, the largest first.
    """
    counted = node_macs(graph_module)
    total = sum(counted.values())
    in_float = {node: macs for node, macs in counted.items() if macs and not _is_quantized(graph_module, node)}
    largest = sorted(in_float, key=lambda node: -in_float[node])[:LISTED]
    return {
        "total": total,
        "float_share": sum(in_float.values()) / total if total else 0.0,
        "largest_in_float": [{"node": _name(node), "share": in_float[node] / total} for node in largest],
    }


def with_execution(shares: Mapping[str, Any], layers: Sequence[LayerRow]) -> dict[str, Any]:
    """`checked_shares` of a lowered model: also `integer_share` and `simulated_share`, from the layers' kernels."""
    if not shares:
        return {}  # of a file that does not say
    integer = sum(row.macs for row in layers if row.execution != "simulated") / max(shares["total"], 1)
    integer = min(integer, 1.0 - shares["float_share"])
    rest = max(1.0 - shares["float_share"] - integer, 0.0)
    return {**shares, "integer_share": integer, "simulated_share": rest}


def checked_shares(value: Any) -> dict[str, Any]:
    """What a card says of its multiply-accumulates, {} where it says nothing.

    Raises ArtefactError where it is not what `mac_shares` or `with_execution` gives.
    """
    if value is None or value == {}:
        return {}
    shares = {key: value[key] for key in _SHARES if key in value} if isinstance(value, dict) else {}
    largest = value.get("largest_in_float") if isinstance(value, dict) else None
    entries = largest if isinstance(largest, list) else [None]
    named = all(isinstance(e, dict) and isinstance(e.get("node"), str) and _is_share(e.get("share")) for e in entries)
    total = value.get("total") if isinstance(value, dict) else None
    if not ("float_share" in shares and all(map(_is_share, shares.values())) and named and type(total) is int):
        raise ArtefactError("the card's 'multiply_accumulates' are no shares: the file was not written by fxquant")
    return {"total": total, **shares, "largest_in_float": entries}


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def node_macs(graph_module: GraphModule) -> dict[Node, int]:
    """Multiply-accumulates of every node that has some, for one image."""
    batch_size = image_of(graph_module).meta["tensor_meta"].shape[0]
    found = {}
    for node in graph_module.graph.nodes:
        macs = _macs(graph_module, node)
        if macs:
            found[node] = macs if macs % batch_size else macs // batch_size
    return found


def _is_quantized(graph_module: GraphModule, node: Node) -> bool:
    module = module_of(graph_module, node)
    if isinstance(module, QuantizedWeightModule):
        return module.weight_quantizer is not None and module.input_quantizer is not None
    if isinstance(module, QuantizedMatmul):
        return module.left_quantizer is not None and module.right_quantizer is not None
    return False


def _name(node: Node) -> str:
    layer = annotation_of(node).layer
    if layer or node.op == "call_module":
        return layer or str(node.target)
    scope = scope_of(node)
    return f"{scope}.{node.name}" if scope and not node.name.startswith(scope.replace(".", "_")) else node.name


def _macs(graph_module: GraphModule, node: Node) -> int:
    """Of the whole traced batch; 0 for what multiplies no tensors, and where a shape is not known."""
    out = shape_of(node)
    if node.op == "call_module":
        return _module_macs(graph_module.get_submodule(str(node.target)), node, out)
    if node.op not in ("call_function", "call_method") or out is None:
        return 0
    elements = math.prod(out)
    shapes = [shape_of(value) or () for value in node.args]
    if node.target in _MATMULS:
        return elements * (shapes[0] or (0,))[-1]
    if node.target in _ADDED_MATMULS:
        return elements * (shapes[1] or (0,))[-1]
    if node.target is functional.linear:
        return elements * (shape_of(argument(node, 1, "weight")) or (0,))[-1]
    if node.target in _CONVOLUTIONS:
        return elements * math.prod((shape_of(argument(node, 1, "weight")) or (0, 0))[1:])
    if node.target in _TRANSPOSED:
        weight = shape_of(argument(node, 1, "weight")) or (0, 0)
        return math.prod(shape_of(argument(node, 0, "input")) or (0,)) * math.prod(weight[1:])
    if node.target is torch.einsum:
        return _einsum_macs(node, elements)
    if node.target is functional.scaled_dot_product_attention:
        query, key, value = (shape_of(argument(node, i, n)) for i, n in enumerate(("query", "key", "value")))
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]) if query and key and value else 0
    if node.target is functional.bilinear:
        return elements * math.prod((shape_of(argument(node, 2, "weight")) or (0, 0))[1:])
    if node.target is torch.tensordot:
        return math.isqrt(elements * math.prod(shapes[0]) * math.prod(shapes[1]))
    return 0


def _module_macs(module: nn.Module, node: Node, out: tuple[int, ...] | None) -> int:
    source = shape_of(node.args[0]) if node.args else None
    if out is None or source is None:
        return _attention_macs(module, source) if isinstance(module, nn.MultiheadAttention) else 0
    if isinstance(module, QuantizedMatmul):
        return math.prod(out) * source[-1]
    weight = module.weight_like if isinstance(module, QuantizedWeightModule) else getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return math.prod(source) * int(module.weight[0].numel())
    multiplies = nn.Linear | nn.Bilinear | nn.modules.conv._ConvNd | QuantizedWeightModule
    if isinstance(module, multiplies) and isinstance(weight, torch.Tensor):
        return math.prod(out) * int(weight[0].numel())
    return _attention_macs(module, source) if isinstance(module, nn.MultiheadAttention) else 0


def _attention_macs(module: nn.MultiheadAttention, source: tuple[int, ...] | None) -> int:
    """Four projections and two products, of a module that stayed whole, with queries that are the keys too."""
    if source is None or len(source) != 3:
        return 0
    images, tokens = (source[0], source[1]) if module.batch_first else (source[1], source[0])
    return int(images * tokens * module.embed_dim * (4 * module.embed_dim + 2 * tokens))


def _einsum_macs(node: Node, elements: int) -> int:
    """Output elements times the sizes of what is summed over."""
    operands = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
    if not isinstance(node.args[0], str) or len(operands) < 2:
        return 0
    inputs, _, output = node.args[0].replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=False):
        head, _, tail = letters.partition("...")
        shape = shape_of(operand) or ()
        sizes |= dict(zip(head, shape, strict=False))
        sizes |= dict(zip(reversed(tail), reversed(shape), strict=False))
    return elements * math.prod(size for letter, size in sizes.items() if letter not in output)
