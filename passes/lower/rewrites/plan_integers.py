"""PlanIntegers: mark what kernels can run exactly, and put nodes that give bytes before it; see `integer_plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

from fxquant.graph.annotation import annotation_of
from fxquant.graph.facts import Fact
from fxquant.graph.names import add_module
from fxquant.graph.nodes import input_of, readers
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.lowered import RowLogToCodes, ToCodes
from passes.lower.exact_codes import integer_nodes, simulated_layers
from passes.lower.integer_plan import Planned, code_of, factor_of, moves, pads_zero, set_dtype, set_planned, shape_of
from passes.lower.rewrite import REQUIRES, note_misses
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class PlanIntegers:
    """Plan every node that kernels run exactly; the others miss, with the reason."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Plan in place; returns how many nodes will run as integers."""
        note_misses(context, self, simulated_layers(graph_module), outcome="simulated")
        planned = integer_nodes(graph_module)
        made = []
        for node, codes in planned.items():
            set_planned(node, Planned(codes, (annotation_of(node).layer,)))
            for index, code in enumerate(codes):
                source = input_of(node, index)
                assert source is not None  # `integer_codes` has seen its shape
                given = _add_codes(graph_module, source, code)
                node.update_arg(index, given)
                made.append(given)
        for given in dict.fromkeys(made):
            _hoist(graph_module, given)
        return len(planned)


def _add_codes(graph_module: GraphModule, source: Node, code: ByteCode) -> Node:
    """A node with the codes of `source`; where one gives equal ones already, that."""
    found = next((node for node in source.users if code_of(graph_module, node) == code), None)
    if found is not None:
        return found
    name = add_module(graph_module, f"codes_{source.name}", RowLogToCodes(code) if code.of_rows else ToCodes(code))
    with graph_module.graph.inserting_after(source):
        codes = graph_module.graph.call_module(name, (source,))
    codes.meta["tensor_meta"] = source.meta["tensor_meta"]
    set_dtype(codes, torch.uint8)
    return codes


def _hoist(graph_module: GraphModule, codes: Node) -> None:
    """Move a ToCodes node, and with it a factor before it, before the operations that only move numbers around."""
    code = code_of(graph_module, codes)
    if code is None or code.of_rows:  # moves may change what a row is
        return
    source = input_of(codes)
    has_factor = source is not None and factor_of(source) is not None and list(source.users) == [codes]
    first = source if source is not None and has_factor else codes
    while True:
        move = input_of(first)
        if move is None or readers(move) != [first] or not (moves(move) or pads_zero(move, code)):
            return
        source = input_of(move)
        if source is None or shape_of(source) is None:  # a file need not note every node's
            return
        _exchange(first, codes, move, source, code)


def _exchange(first: Node, codes: Node, move: Node, source: Node, code: ByteCode) -> None:
    """From source, move, first .. codes to source, first .. codes, move."""
    codes.replace_all_uses_with(move)
    first.replace_input_with(move, source)
    for node in dict.fromkeys((codes, first)):
        source.append(node)
        node.meta["tensor_meta"] = source.meta["tensor_meta"]
    move.replace_input_with(source, codes)
    if move.target is functional.pad:
        move.args, move.kwargs = (codes, move.args[1]), {"mode": "constant", "value": code.zero}
    for node in (codes, move):
        set_dtype(node, torch.uint8)
