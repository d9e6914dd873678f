"""FuseEpilogues: linear layers do themselves what directly follows them.

linear -> codes; linear -> factor -> codes; linear -> GELU -> codes (by a table, where GELU takes 14-bit codes); linear
-> residual addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.facts import Fact
from fxquant.graph.nodes import input_of, module_of, only_reader
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.byte_table import byte_table
from fxquant.runtime.integer.lowered import Epilogue
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedInput, QuantizedLinear
from passes.lower.integer_plan import (
    SUMS,
    code_of,
    factor_of,
    layer_of,
    operation_of,
    planned_nodes,
    planned_of,
    set_epilogue,
    shape_of,
)
from passes.lower.rewrite import REQUIRES, Miss, note_misses
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class _Codes:
    """A match: the node whose codes the layer gives, and how."""

    codes: Node
    epilogue: Epilogue


@dataclass(frozen=True)
class _Residual:
    """A match: the sum that the layer forms, and what it adds."""

    total: Node
    residual: Node


@dataclass(frozen=True)
class FuseEpilogues:
    """Let every planned linear layer without an epilogue do what follows it."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Fuse in place; returns how many layers."""
        misses, fused = [], 0
        for node in planned_nodes(graph_module):
            planned = planned_of(node)
            is_linear = isinstance(module_of(graph_module, node), QuantizedLinear)
            if planned is None or planned.epilogue.kind or not is_linear:
                continue
            found = _match(graph_module, node)
            if isinstance(found, Miss):
                misses.append(found)
                continue
            _give_codes(node, found) if isinstance(found, _Codes) else _add_residual(node, found)
            fused += 1
        note_misses(context, self, misses)
        return fused


def _match(graph_module: GraphModule, node: Node) -> _Codes | _Residual | Miss:
    follower = only_reader(node)
    if follower is None:
        return Miss(layer_of(node), "several nodes read its result, or none")
    code = code_of(graph_module, follower)
    if code is not None:
        if not code.identity:
            return Miss(layer_of(node), "the kernel writes codes of uniform quantizers and codebooks only")
        return _Codes(follower, Epilogue(library.CODES, (code,)))
    activation = module_of(graph_module, follower)
    inner = activation.inner if isinstance(activation, QuantizedInput) else activation
    if isinstance(inner, nn.GELU):
        return _after_gelu(graph_module, node, follower)
    if factor_of(follower) is not None:
        return _after_factor(graph_module, node, follower)
    if follower.target in SUMS:
        return _residual(node, follower)
    return Miss(layer_of(node), f"the kernel does not do what {operation_of(graph_module, follower)} does behind it")


def _codes_behind(graph_module: GraphModule, node: Node) -> tuple[Node, ByteCode] | None:
    codes = only_reader(node)
    code = code_of(graph_module, codes)
    return None if codes is None or code is None else (codes, code)


def _after_gelu(graph_module: GraphModule, node: Node, follower: Node) -> _Codes | Miss:
    activation = module_of(graph_module, follower)
    behind = _codes_behind(graph_module, follower)
    if behind is None:
        return Miss(layer_of(node), "several nodes read GELU, or one in float")
    codes, code = behind
    if isinstance(activation, nn.GELU):
        if activation.approximate != "none":
            return Miss(layer_of(node), "the kernel computes GELU exactly, not its tanh approximation")
        return _Codes(codes, Epilogue(library.GELU_CODES, (code,)))
    assert isinstance(activation, QuantizedInput)  # the caller has seen its inner module
    table = byte_table(activation.input_quantizer, activation.inner, code)
    if table is None:
        return Miss(layer_of(node), "GELU's input is quantized, and no table holds the codes behind it")
    return _Codes(codes, Epilogue(library.TABLE_CODES, table=table))


def _after_factor(graph_module: GraphModule, node: Node, follower: Node) -> _Codes | Miss:
    behind, factor = _codes_behind(graph_module, follower), factor_of(follower)
    if behind is None or factor is None or not behind[1].identity:
        return Miss(layer_of(node), "what is multiplied by a number is read in float, or by several nodes")
    return _Codes(behind[0], Epilogue(library.CODES, (behind[1],), (factor,)))


def _residual(node: Node, total: Node) -> _Residual | Miss:
    if len(total.args) != 2 or total.kwargs:
        return Miss(layer_of(node), "the sum behind it has a factor")
    left, right = total.args
    residual = right if left is node else left
    if residual is node or not isinstance(residual, Node) or shape_of(residual) != shape_of(node):
        return Miss(layer_of(node), "what is added to it has another shape, or is its own result")
    if len(node.users) != 1:
        return Miss(layer_of(node), "somebody asks for its shape, perhaps before the residual is there")
    return _Residual(total, residual)


def _give_codes(node: Node, found: _Codes) -> None:
    set_epilogue(node, found.epilogue)
    found.codes.replace_all_uses_with(node)
    source = input_of(found.codes)
    node.graph.erase_node(found.codes)
    if source is not None and source is not node:
        source.replace_all_uses_with(node)  # those that ask for its shape
        node.graph.erase_node(source)


def _add_residual(node: Node, found: _Residual) -> None:
    found.total.prepend(node)  # the residual may be computed between the two
    found.total.replace_all_uses_with(node)
    node.graph.erase_node(found.total)
    node.args = (node.args[0], found.residual)
    set_epilogue(node, Epilogue(library.RESIDUAL))
