"""The graph while it is lowered: which nodes will run as integers, on which codes, and where bytes flow already.

`plan` marks what kernels can run exactly and puts a ToCodes node on each of its quantized inputs, one for all readers
of an edge that share a quantizer, as early as the bytes can be made: before views, transposes, rolls and zero-padding.
Fusions (`passes.lower.rewrites.fuse_codes`) change plans; `Lower` builds the modules.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import TensorMetadata
from torch.nn import functional

from fxquant.graph.names import add_module
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode, byte_code
from fxquant.runtime.integer.lowered import Epilogue, RowLogToCodes, ToCodes
from fxquant.runtime.native.library import MAX_INNER
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedLinear, QuantizedMatmul, QuantizedWeightModule

_MOVES = {
    "view", "reshape", "permute", "transpose", "contiguous", "flatten", "unsqueeze", "squeeze", "roll",
    torch.roll, torch.permute, torch.transpose, torch.reshape, torch.flatten,
}  # fmt: skip
SUMS = (operator.add, operator.iadd, torch.add, "add")


@dataclass(frozen=True)
class Planned:
    """A node that will run as integers: the codes of its inputs, what happens to its result."""

    codes: tuple[ByteCode, ...]
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass
class IntegerPlan:
    """nodes: what runs as integers. made: the code of every ToCodes node."""

    graph_module: GraphModule
    nodes: dict[Node, Planned] = field(default_factory=dict)
    made: dict[Node, ByteCode] = field(default_factory=dict)

    def module(self, node: Node | None) -> nn.Module | None:
        """The module that a node calls, None where it calls none."""
        return module_of(self.graph_module, node)

    def set_epilogue(self, node: Node, epilogue: Epilogue) -> None:
        """Change what a planned node does with its result."""
        self.nodes[node] = replace(self.nodes[node], epilogue=epilogue)
        if epilogue.gives_codes:
            set_dtype(node, torch.uint8)

    def add_codes(self, source: Node, code: ByteCode) -> Node:
        """A node with the codes of `source`, made as early as possible; an equal one is used again."""
        found = next((node for node in source.users if self.made.get(node) == code), None)
        if found is not None:
            return found
        module = RowLogToCodes(code) if code.of_rows else ToCodes(code)
        name = add_module(self.graph_module, f"codes_{source.name}", module)
        with self.graph_module.graph.inserting_after(source):
            codes = self.graph_module.graph.call_module(name, (source,))
        self.made[codes] = code
        codes.meta["tensor_meta"] = source.meta["tensor_meta"]
        set_dtype(codes, torch.uint8)
        return codes

    def hoist(self, codes: Node) -> None:
        """Move a ToCodes node before the operations that only move numbers around."""
        code = self.made[codes]
        if code.of_rows:  # moves may change what a row is
            return
        while True:
            move = codes.args[0]
            assert isinstance(move, Node)  # `add_codes` gave it one
            if readers(move) != [codes] or not (moves(move) or _pads_zero(move, code)):
                return
            source = move.args[0]
            assert isinstance(source, Node)  # moves have a tensor as their first argument
            if shape_of(source) is None:  # a file need not note every node's
                return
            codes.replace_all_uses_with(move)
            codes.args = (source,)
            source.append(codes)
            codes.meta["tensor_meta"] = source.meta["tensor_meta"]
            move.args = (codes, *move.args[1:])
            if move.target is functional.pad:
                move.args, move.kwargs = (codes, move.args[1]), {"mode": "constant", "value": code.zero}
            for node in (codes, move):
                set_dtype(node, torch.uint8)


def plan(graph_module: GraphModule) -> IntegerPlan:
    """Mark what runs as integers and put ToCodes nodes on its inputs; see the module."""
    found = IntegerPlan(graph_module)
    for node, codes in integer_nodes(graph_module).items():
        found.nodes[node] = Planned(codes)
        for index, code in enumerate(codes):
            source = node.args[index]
            assert isinstance(source, Node)  # `integer_codes` has seen its shape
            node.update_arg(index, found.add_codes(source, code))
    for codes_node in list(found.made):
        found.hoist(codes_node)
    return found


def integer_nodes(graph_module: GraphModule) -> dict[Node, tuple[ByteCode, ...]]:
    """Nodes that can run as integers, in graph order, with the codes of their inputs."""
    found = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            codes = integer_codes(graph_module.get_submodule(str(node.target)), node)
            if codes is not None:
                found[node] = codes
    return found


def integer_codes(module: nn.Module | None, node: Node) -> tuple[ByteCode, ...] | None:
    """The codes on which a node runs exactly as integers; None where it must stay simulated.

    Subclasses may compute something else: they are not for the kernels.
    """
    if type(module) not in (QuantizedLinear, QuantizedConv2d, QuantizedMatmul):
        return None
    if isinstance(module, QuantizedLinear):
        return _weight_codes(module, module.input_quantizer, node)
    if isinstance(module, QuantizedConv2d):
        geometry = module.geometry
        is_plain = geometry["groups"] == 1 and geometry["dilation"] in (1, (1, 1), [1, 1])
        found = _weight_codes(module, module.input_quantizer, node) if is_plain else None
        is_padded = geometry["padding"] not in (0, (0, 0), [0, 0])
        if found is None or isinstance(geometry["padding"], str) or (is_padded and not found[0].identity):
            return None
        return found
    if isinstance(module, QuantizedMatmul):
        left, right = byte_code(module.left_quantizer), byte_code(module.right_quantizer)
        shapes = [shape_of(source) for source in node.args]
        if left is None or right is None or not right.identity or len(shapes) != 2:
            return None
        if shapes[0] is None or shapes[1] is None or len(shapes[0]) < 3 or shapes[0][:-2] != shapes[1][:-2]:
            return None
        return (left, right) if shapes[0][-1] <= MAX_INNER else None
    return None


def _weight_codes(
    module: QuantizedWeightModule, quantizer: Quantizer | None, node: Node
) -> tuple[ByteCode, ...] | None:
    weight, codes = module.weight_quantizer, module.weight_codes
    is_symmetric = isinstance(weight, UniformQuantizer) and weight.zero_point is None and codes is not None
    code = byte_code(quantizer)
    if not is_symmetric or code is None or codes is None or weight is None or shape_of(node.args[0]) is None:
        return None
    if code.of_rows:  # only products of two activations are divided by the row's sum
        return None
    is_per_channel = getattr(weight, "scale").numel() in (1, len(codes))  # noqa: B009
    return (code,) if is_per_channel and codes[0].numel() <= MAX_INNER else None


def module_of(graph_module: GraphModule, node: Node | None) -> nn.Module | None:
    """The module that a node calls, None where it calls none."""
    is_call = node is not None and node.op == "call_module"
    return graph_module.get_submodule(str(node.target)) if node is not None and is_call else None


def readers(node: Node) -> list[Node]:
    """Users of a node that read its numbers, not only its shape."""
    return [user for user in node.users if not (user.target is getattr and user.args[1] in ("shape", "ndim"))]


def input_of(node: Node | None, index: int = 0) -> Node | None:
    """The node that an argument of a node is, None where it is something else."""
    found = node.args[index] if node is not None and len(node.args) > index else None
    return found if isinstance(found, Node) else None


def only_reader(node: Node | None) -> Node | None:
    """The one user that reads a node's numbers, None where there are several or none."""
    found = [] if node is None else readers(node)
    return found[0] if len(found) == 1 else None


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
    """Note that a node holds a tensor of this shape; of the dtype of `like` where nothing was known of it."""
    metadata = node.meta.get("tensor_meta", like.meta["tensor_meta"])
    node.meta["tensor_meta"] = metadata._replace(shape=torch.Size(shape))


def moves(node: Node) -> bool:
    """Whether a node only moves numbers around."""
    return node.op in ("call_method", "call_function") and node.target in _MOVES and input_of(node) is not None


def _pads_zero(node: Node, code: ByteCode) -> bool:
    if node.target is not functional.pad or len(node.args) != 2 or not code.has_zero:
        return False
    mode, value = node.kwargs.get("mode", "constant"), node.kwargs.get("value")
    return bool(mode == "constant" and (value is None or value == 0))
