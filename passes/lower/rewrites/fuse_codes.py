"""Fusions that keep bytes between layers: each is a small rewrite of an `IntegerPlan`, sound by itself.

- `fuse_attention`: qkv -> split -> scale -> q k^T (+ bias) -> softmax -> v becomes one node, bytes to bytes.
- `fuse_epilogues`: linear -> GELU -> codes (by a table, where GELU takes 14-bit codes), linear -> codes and linear ->
  residual addition become the linear's.
- `fuse_layer_norms`: layer norm -> codes becomes one node.

What does not match stays as it is, and runs: patterns only make it faster.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.graph.annotation import Role, annotation_of
from fxquant.graph.names import add_module, exchange_module
from fxquant.graph.nodes import constant_of
from fxquant.runtime.integer.byte_table import byte_table
from fxquant.runtime.integer.lowered import AttentionCodes, Epilogue, IntegerAttention, LayerNormToCodes
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedInput, QuantizedLinear
from passes.lower.integer_plan import SUMS, IntegerPlan, input_of, only_reader, set_dtype, shape_of


@dataclass(frozen=True)
class _Attention:
    """What a matched attention consists of."""

    linear: Node
    end: Node
    heads: int
    head_size: int
    factors: tuple[float, ...]
    codes: AttentionCodes
    bias_ghnn: Tensor | None
    layers: tuple[str, ...]


def fuse_attention(plan: IntegerPlan) -> dict[str, str]:
    """Fuse every attention that matches; returns kernels by the public names of the nodes that are gone."""
    kernels: dict[str, str] = {}
    for node in [n for n in plan.nodes if annotation_of(n).role is Role.AV]:
        found = _match(plan, node)
        if found is None:
            continue
        graph_module = plan.graph_module
        module = IntegerAttention(found.heads, found.head_size, found.codes, found.bias_ghnn)
        wanted = f"{str(found.linear.target).rpartition('.')[0]}.integer_attention".lstrip(".")
        name = add_module(graph_module, wanted, module)
        with graph_module.graph.inserting_before(found.end):
            fused = graph_module.graph.call_module(name, (found.linear,))
        fused.meta["tensor_meta"] = found.end.meta["tensor_meta"]
        found.end.replace_all_uses_with(fused)
        plan.set_epilogue(found.linear, Epilogue(library.CODES, found.codes.qkv, found.factors))
        kernels |= dict.fromkeys(found.layers, "attention")
        graph_module.graph.eliminate_dead_code()
        alive = set(graph_module.graph.nodes)
        plan.nodes = {n: planned for n, planned in plan.nodes.items() if n in alive}
        plan.made = {n: code for n, code in plan.made.items() if n in alive}
    return kernels


def _match(plan: IntegerPlan, av: Node) -> _Attention | None:
    weights, values, output = input_of(av, 0), input_of(av, 1), only_reader(av)
    softmax = input_of(weights)
    module = plan.module(softmax)
    if weights not in plan.made or output not in plan.made or only_reader(weights) is not av:
        return None
    if not isinstance(module, nn.Softmax) or module.dim not in (-1, 3) or only_reader(softmax) is not weights:
        return None
    qk, bias = _scores(plan, input_of(softmax))
    operands = (input_of(qk, 0), _untransposed(input_of(qk, 1)), values)
    parts = [_part(plan, codes, index) for index, codes in enumerate(operands)]
    splits = {part[0] for part in parts if part is not None}
    if qk is None or softmax is None or None in parts or len(splits) != 1:
        return None
    shape = shape_of(av) or ()
    if len(shape) != 4:
        return None
    _, heads, tokens, size = shape
    linear, end = _split_linear(plan, splits.pop(), shape), _merged_heads(output)
    if linear is None or end is None or (shape_of(end) or ())[1:] != (tokens, heads * size) or not _asks(end):
        return None
    query, key, value = (plan.made[codes] for codes in operands if codes is not None)
    if not (query.identity and key.identity and value.identity) or plan.made[weights].kind == library.CODEBOOK:
        return None
    codes = AttentionCodes((query, key, value), plan.made[weights], plan.made[output])
    layers = tuple(annotation_of(node).layer for node in (qk, softmax, av))
    factors = tuple(part[1] for part in parts if part is not None)
    return _Attention(linear, end, heads, size, factors, codes, bias, layers)


def _scores(plan: IntegerPlan, node: Node | None) -> tuple[Node | None, Tensor | None]:
    """The product under a softmax, and the constant (groups, heads, N, N) added to it; no node for anything else."""
    bias, shape = None, shape_of(node)
    while node is not None and node not in plan.nodes:
        if only_reader(node) is None or shape is None or len(shape) != 4:
            return None, None
        if node.target in SUMS and len(node.args) == 2 and not node.kwargs:
            constant = constant_of(plan.graph_module, node.args[1])
            full = None if constant is None else _grouped(constant, shape_of(node) or (), shape)
            if full is None:
                return None, None
            bias = full if bias is None else bias + full
        elif node.target not in ("view", "reshape"):
            return None, None
        node = input_of(node)
    return (node, bias) if only_reader(node) is not None else (None, None)


def _grouped(constant: Tensor, shape: tuple[int, ...], scores: tuple[int, ...]) -> Tensor | None:
    """A constant added to scores (B, H, N, N), or to their view (B / groups, groups, H, N, N): (groups, H, N, N)."""
    _, heads, n, m = scores
    is_viewed = len(shape) == 5 and shape[2:] == (heads, n, m)
    if not is_viewed and shape[1:] != (heads, n, m):
        return None
    while constant.ndim > 4 and len(constant) == 1:
        constant = constant[0]
    if constant.ndim > 4 or (constant.ndim == 4 and len(constant) != (shape[1] if is_viewed else 1)):
        return None
    return constant.float().broadcast_to((shape[1] if is_viewed else 1, heads, n, m)).contiguous()


def _untransposed(node: Node | None) -> Node | None:
    """What is transposed over its last two dimensions, None for anything else."""
    if node is None or node.target not in ("transpose", torch.transpose):
        return None
    return input_of(node) if node.args[1:] in ((-2, -1), (-1, -2), (2, 3), (3, 2)) else None


def _part(plan: IntegerPlan, codes: Node | None, index: int) -> tuple[Node, float] | None:
    """The node that q, k and v are items of, and the constant that this one is multiplied by."""
    if codes not in plan.made or only_reader(codes) is None:
        return None
    node, factor = input_of(codes), 1.0
    if node is not None and node.target in (operator.mul, torch.mul, "mul") and only_reader(node) is codes:
        scale = node.args[1]
        if not isinstance(scale, float):
            return None
        node, factor = input_of(node), scale
    if node is None or node.target is not operator.getitem or node.args[1] != index or only_reader(node) is None:
        return None
    source = input_of(node)
    return None if source is None else (source, factor)


def _split_linear(plan: IntegerPlan, unbind: Node, result: tuple[int, ...]) -> Node | None:
    """The linear layer (B, N, 3 H D) whose result is split as reshape, permute(2, 0, 3, 1, 4), unbind(0).

    result: (B, H, N, D) of the attention. Sizes are believed only where the graph and the shapes noted in it agree.
    """
    permute = input_of(unbind)
    reshape = input_of(permute)
    linear = input_of(reshape)
    if unbind.target not in ("unbind", torch.unbind) or unbind.args[1:] not in ((0,), ()) or len(unbind.users) != 3:
        return None
    if permute is None or permute.target != "permute" or permute.args[1:] != (2, 0, 3, 1, 4):
        return None
    if reshape is None or reshape.target not in ("reshape", "view") or only_reader(permute) is not unbind:
        return None
    batch, heads, tokens, size = result
    is_split = shape_of(reshape) == (batch, tokens, 3, heads, size) and _asks(reshape)
    is_split &= shape_of(linear) == (batch, tokens, 3 * heads * size)
    is_alone = only_reader(linear) is reshape and only_reader(reshape) is permute
    return linear if is_split and is_alone and isinstance(plan.module(linear), QuantizedLinear) else None


def _asks(view: Node) -> bool:
    """Whether the sizes that a view asks for, where it names any, are those of the shape noted for it."""
    sizes = view.args[1] if isinstance(view.args[1], tuple | list) else view.args[1:]
    if view.target == "flatten":
        return True
    shape = shape_of(view) or ()
    pairs = zip(sizes, shape, strict=False)
    return len(sizes) == len(shape) and all(type(size) is not int or size in (-1, noted) for size, noted in pairs)


def _merged_heads(codes: Node | None) -> Node | None:
    """The node that merges the heads of codes (B, H, N, D): transpose(1, 2), then reshape to (B, N, H D)."""
    transpose = only_reader(codes)
    if transpose is None or transpose.target != "transpose" or transpose.args[1:] not in ((1, 2), (2, 1)):
        return None
    reshape = only_reader(transpose)
    return reshape if reshape is not None and reshape.target in ("reshape", "flatten", "view") else None


def fuse_epilogues(plan: IntegerPlan) -> None:
    """Let linear layers do what directly follows them."""
    for node in list(plan.nodes):
        module = plan.module(node)
        follower = only_reader(node)
        if not isinstance(module, QuantizedLinear) or follower is None or plan.nodes[node].epilogue.kind:
            continue
        code = plan.made.get(follower)
        activation = plan.module(follower)
        if code is not None and code.identity:
            _give_codes(plan, node, follower, Epilogue(library.CODES, (code,)))
        elif isinstance(activation, nn.GELU) and activation.approximate == "none":
            codes = only_reader(follower)
            if codes is not None and codes in plan.made:
                _give_codes(plan, node, codes, Epilogue(library.GELU_CODES, (plan.made[codes],)))
        elif isinstance(activation, QuantizedInput) and isinstance(activation.inner, nn.GELU):
            codes = only_reader(follower)
            found = plan.made.get(codes) if codes is not None else None
            table = None if found is None else byte_table(activation.input_quantizer, activation.inner, found)
            if codes is not None and table is not None:
                _give_codes(plan, node, codes, Epilogue(library.TABLE_CODES, table=table))
        elif follower.target in SUMS and len(follower.args) == 2 and not follower.kwargs:
            _add_residual(plan, node, follower)


def _give_codes(plan: IntegerPlan, node: Node, codes: Node, epilogue: Epilogue) -> None:
    plan.set_epilogue(node, epilogue)
    codes.replace_all_uses_with(node)
    del plan.made[codes]
    source = input_of(codes)
    node.graph.erase_node(codes)
    if source is not None and source is not node:
        source.replace_all_uses_with(node)  # those that ask for its shape
        node.graph.erase_node(source)


def _add_residual(plan: IntegerPlan, node: Node, total: Node) -> None:
    left, right = total.args
    residual = right if left is node else left
    if residual is node or not isinstance(residual, Node) or shape_of(residual) != shape_of(node):
        return
    if len(node.users) != 1:
        return  # somebody asks for its shape, perhaps before the residual is there
    total.prepend(node)  # the residual may be computed between the two
    total.replace_all_uses_with(node)
    node.graph.erase_node(total)
    node.args = (node.args[0], residual)
    plan.set_epilogue(node, Epilogue(library.RESIDUAL))


def fuse_layer_norms(plan: IntegerPlan) -> None:
    """Let layer norms over the last dimension give codes, where nothing else reads them."""
    for codes, code in list(plan.made.items()):
        norm = input_of(codes)
        module = plan.module(norm)
        if norm is None or not isinstance(module, nn.LayerNorm) or only_reader(norm) is not codes or code.of_rows:
            continue
        if len(module.normalized_shape) != 1 or shape_of(input_of(norm)) is None:
            continue
        exchange_module(plan.graph_module, norm, LayerNormToCodes(module, code))
        codes.replace_all_uses_with(norm)
        del plan.made[codes]
        norm.graph.erase_node(codes)
        set_dtype(norm, torch.uint8)
