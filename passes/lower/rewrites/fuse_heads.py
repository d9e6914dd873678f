"""FuseHeads: attention reads q, k and v where linear layers write them, and gives its heads side by side.

Splitting a result into q, k and v and into heads, and merging heads again, only moves numbers. Strides tell which
columns of which layer come to lie where (`passes.lower.moved`), so every spelling is found: one layer for q, k and v
or one for each, reshape and permute, chunk, unbind, einsum. The layer then gives the bytes of q, k and v in the order
in which the kernel reads them: its rows are sorted once, or three layers that read the same bytes become one.

Deliberately not done: layers whose inputs have quantizers of their own. They give bytes, which are put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.facts import Fact
from fxquant.graph.names import add_module, exchange_module
from fxquant.graph.nodes import input_of, module_of, only_reader, readers
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.lowered import Epilogue, IntegerAttention, SeparateAttention
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedLinear
from passes.lower.integer_plan import (
    Planned,
    code_of,
    factor_of,
    layer_of,
    moves,
    operation_of,
    planned_of,
    set_dtype,
    set_planned,
    set_shape,
    shape_of,
)
from passes.lower.moved import COUNTS, columns_of, moved, parts
from passes.lower.rewrite import REQUIRES, Miss, note_misses
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class _Operand:
    """q, k or v: columns (heads size,) of a linear layer's result, times a factor. path: the nodes between."""

    linear: Node
    columns: Tensor
    factor: float
    path: tuple[Node, ...]


@dataclass(frozen=True)
class _Heads:
    """A match. operands: q, k, v. end: the node that holds (B, N, heads size)."""

    operands: tuple[_Operand, ...]
    end: Node


@dataclass(frozen=True)
class FuseHeads:
    """Read linear layers directly, where attention matches; the others put bytes together first."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Fuse in place; returns how many attentions."""
        misses, fused = [], 0
        for node in list(graph_module.graph.nodes):
            module = module_of(graph_module, node)
            if not isinstance(module, SeparateAttention):
                continue
            found = _match(graph_module, node, module)
            if isinstance(found, Miss):
                misses.append(found)
                continue
            _rewrite(graph_module, node, module, found)
            fused += 1
        note_misses(context, self, misses)
        return fused


def _match(graph_module: GraphModule, node: Node, module: SeparateAttention) -> _Heads | Miss:
    operands = []
    for name, index in (("queries", 0), ("keys", 1), ("values", 2)):
        found = _operand(graph_module, node, index)
        if isinstance(found, str):
            return Miss(layer_of(node), f"{name}: {found}")
        operands.append(found)
    problem = _apart(graph_module, operands)
    if problem:
        return Miss(layer_of(node), problem)
    inside = {step for operand in operands for step in operand.path}
    linears = list(dict.fromkeys(operand.linear for operand in operands))
    # A layer that stays what it is keeps its shape, which may be asked for; what becomes another one does not.
    ends = [reader for linear in linears for reader in (readers(linear) if len(linears) == 1 else linear.users)]
    if not all(
        _leads_into(user, inside | {node}) for user in [*ends, *(user for step in inside for user in step.users)]
    ):
        return Miss(layer_of(node), "something else reads queries, keys or values, or asks for their shape")
    end = _merged(node, module)
    return Miss(layer_of(node), "its heads are not merged to tokens") if end is None else _Heads(tuple(operands), end)


def _operand(graph_module: GraphModule, attention: Node, index: int) -> _Operand | str:
    """What an operand of the attention is made of; else why it is none of a linear layer's columns."""
    path, factor, node = [], 1.0, input_of(attention, index)
    while node is not None and planned_of(node) is None:
        own = factor_of(node)
        factor *= 1.0 if own is None else own
        if own is None and code_of(graph_module, node) is None and not parts(node):
            return f"{operation_of(graph_module, node)} is between the linear layer and the attention"
        path.append(node)
        node = input_of(node)
    if node is None or not isinstance(module_of(graph_module, node), QuantizedLinear):
        return "they do not come from a linear layer that runs as integers"
    steps = [step for step in reversed(path) if code_of(graph_module, step) is None and factor_of(step) is None]
    wanted, result = shape_of(input_of(attention, index)), shape_of(node)
    if wanted is None or result is None or len(wanted) != 4 or len(result) != 3:
        return "they are not (images, heads, tokens, channels) of (images, tokens, channels)"
    columns = columns_of(steps, result, wanted, is_transposed=index == 1)
    if columns is None:
        return "they are no columns of it, the same for every token"
    return _Operand(node, columns, factor, tuple(path))


def _apart(graph_module: GraphModule, operands: Sequence[_Operand]) -> str:
    """Why no single layer can give all three; "" if one can."""
    linears = list(dict.fromkeys(operand.linear for operand in operands))
    planned = [planned_of(linear) for linear in linears]
    if any(found is None or found.epilogue.kind for found in planned):
        return "a linear layer does something else with its result"
    if len({input_of(linear) for linear in linears}) > 1:
        return "the linear layers of queries, keys and values have quantizers of their own for their input"
    used = sum(len(operand.columns) for operand in operands)
    given = sum((shape_of(linear) or (0,))[-1] for linear in linears)
    places = {(operand.linear, int(column)) for operand in operands for column in operand.columns}
    return "" if used == given == len(places) else "the linear layers give more than queries, keys and values"


def _leads_into(user: Node, inside: set[Node]) -> bool:
    """Whether a user of what will be gone is gone with it: it is inside, or a size that only what is inside needs."""
    if user in inside:
        return True
    is_size = "tensor_meta" not in user.meta and user.op in ("call_function", "call_method")
    return is_size and all(_leads_into(far, inside) for far in user.users)


def _merged(attention: Node, module: SeparateAttention) -> Node | None:
    """The node behind moves of the result (B, H, N, D) that holds (B, N, H D)."""
    shape = shape_of(attention) or ()
    if len(shape) != 4:
        return None
    noted, heads, tokens, size = shape
    path: list[Node] = []
    node = only_reader(attention)
    while node is not None and moves(node):
        path.append(node)
        if all(_is_in_order(path, noted, (count, tokens, heads, size)) for count in COUNTS):
            inside = {*path[:-1], attention}
            is_alone = all(_leads_into(user, inside | {node}) for step in inside for user in step.users)
            return node if is_alone else None
        node = only_reader(node)
    return None


def _is_in_order(path: Sequence[Node], noted: int, shape: tuple[int, ...]) -> bool:
    """Whether moves of (B, H, N, D) give (B, N, H D), and need no copy where tokens hold their heads side by side."""
    start = torch.empty(shape, dtype=torch.uint8).transpose(1, 2)
    found = moved(path, start, noted)
    wanted = (*shape[:2], shape[2] * shape[3])
    return found is not None and tuple(found.shape) == wanted and found.is_contiguous()


def _rewrite(graph_module: GraphModule, node: Node, module: SeparateAttention, found: _Heads) -> None:
    linear = _single(graph_module, found.operands)
    factors = tuple(operand.factor for operand in found.operands)
    planned = planned_of(linear)
    assert planned is not None  # matched
    set_planned(linear, replace(planned, epilogue=Epilogue(library.CODES, module.codes.qkv, factors)))
    set_dtype(linear, torch.uint8)
    fused = IntegerAttention(module.heads, module.head_size, module.codes, module.bias_ghnn)
    exchange_module(graph_module, node, fused)
    node.args = (linear,)
    node.meta["tensor_meta"] = found.end.meta["tensor_meta"]
    found.end.replace_all_uses_with(node)
    graph_module.graph.eliminate_dead_code()


def _single(graph_module: GraphModule, operands: Sequence[_Operand]) -> Node:
    """One planned layer whose result is q, k and v in this order."""
    linears = list(dict.fromkeys(operand.linear for operand in operands))
    columns = torch.cat([operand.columns for operand in operands])
    first = linears[0]
    if len(linears) == 1 and torch.equal(columns, torch.arange(len(columns))):
        return first
    sources = [module for linear in linears if isinstance(module := module_of(graph_module, linear), QuantizedLinear)]
    starts = dict(zip(linears, _starts(sources), strict=True))
    rows = torch.cat([starts[operand.linear] + operand.columns for operand in operands])
    module = _stacked(sources, rows)
    if len(linears) == 1:
        exchange_module(graph_module, first, module)
        return first
    wanted = f"{str(first.target).rpartition('.')[0]}.integer_qkv".lstrip(".")
    name = add_module(graph_module, wanted, module)
    with graph_module.graph.inserting_before(first):
        node = graph_module.graph.call_module(name, first.args)
    plans = [planned for linear in linears if (planned := planned_of(linear)) is not None]
    set_planned(node, Planned(plans[0].codes, tuple(layer for planned in plans for layer in planned.layers)))
    set_shape(node, (*(shape_of(first) or ())[:-1], len(rows)), like=first)
    for linear in linears:
        set_planned(linear, None)
    return node


def _starts(sources: Sequence[QuantizedLinear]) -> list[int]:
    lengths = [len(source.weight_like) for source in sources]
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _stacked(sources: Sequence[QuantizedLinear], rows: Tensor) -> QuantizedLinear:
    """A layer whose outputs are these rows of the layers' outputs, one layer after the other. Codes are as they were;
    the width is the widest."""
    codes, scales, biases, widths = [], [], [], []
    for source in sources:
        quantizer, own = source.weight_quantizer, source.weight_codes
        assert isinstance(quantizer, UniformQuantizer)  # what is planned has one
        assert own is not None
        codes.append(own)
        scales.append(quantizer.scale.reshape(-1).expand(len(own)))
        biases.append(torch.zeros(len(own)) if source.bias is None else source.bias)
        widths.append(quantizer.widest_bits)
    quantizer = UniformQuantizer(max(widths), torch.cat(scales)[rows][:, None])
    # A weight of one column is enough to build with: the real one is derived from the codes when it is read.
    column = torch.zeros(len(rows), 1, dtype=sources[0].weight_dtype)
    stacked = QuantizedLinear(column, torch.cat(biases)[rows], quantizer, sources[0].input_quantizer)
    stacked.weight_codes = torch.cat(codes)[rows]
    return stacked
