"""FuseAttention: softmax(q k^T + bias) v becomes one node that takes the bytes of q, k and v and gives bytes.

Normalization has written every attention in one form (`fxquant.graph.capture.attention_forms`), so what is before q, k
and v does not matter here: linear layers, rotary embeddings, norms. What `FuseHeads` then finds to be moved numbers of
linear layers is read from where they write it.

The kernel takes as many queries as keys, heads of q, k and v of one size, and a bias that is the same for every image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.annotation import Role, annotation_of
from fxquant.graph.facts import Fact
from fxquant.graph.names import add_module
from fxquant.graph.nodes import constant_of, input_of, module_of, only_reader
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.lowered import AttentionCodes, SeparateAttention
from fxquant.runtime.native import library
from passes.lower.integer_plan import (
    SUMS,
    code_of,
    layer_of,
    moves,
    note_kernel,
    operation_of,
    planned_nodes,
    planned_of,
    shape_of,
)
from passes.lower.rewrite import REQUIRES, Miss, note_misses
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class _Attention:
    """A match. operands: nodes of bytes that the products read, k transposed. output: the node that gives the result's
    bytes. inside: the nodes that nobody else reads."""

    operands: tuple[Node, Node, Node]
    output: Node
    inside: tuple[Node, ...]
    codes: AttentionCodes
    bias_ghnn: Tensor | None


@dataclass(frozen=True)
class _Scores:
    """What is under a softmax: the product, and the constant (groups, heads, N, N) that is added to it."""

    product: Node
    bias_ghnn: Tensor | None


@dataclass(frozen=True)
class FuseAttention:
    """Fuse every attention that matches; the others run as two products and a softmax."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Fuse in place; returns how many attentions."""
        misses, fused = [], 0
        for av in [node for node in planned_nodes(graph_module) if annotation_of(node).role is Role.AV]:
            found = _match(graph_module, av)
            if isinstance(found, Miss):
                misses.append(found)
                continue
            _rewrite(graph_module, av, found)
            fused += 1
        note_misses(context, self, misses, outcome="attention in parts")
        return fused


def _match(graph_module: GraphModule, av: Node) -> _Attention | Miss:
    weights = input_of(av, 0)
    softmax = input_of(weights)
    found = _scores(graph_module, weights, softmax, av)
    if weights is None or softmax is None or isinstance(found, str):
        return Miss(layer_of(av), str(found))
    qk, output = found.product, only_reader(av)
    operands = (input_of(qk, 0), input_of(qk, 1), input_of(av, 1))
    codes = _codes(graph_module, operands, weights, output)
    query, key, value = operands
    if query is None or key is None or value is None or output is None or isinstance(codes, str):
        return Miss(layer_of(av), str(codes))
    problem = _misfit(query, key, value, av)
    if problem:
        return Miss(layer_of(av), problem)
    return _Attention((query, key, value), output, (qk, softmax, weights, av), codes, found.bias_ghnn)


def _scores(graph_module: GraphModule, weights: Node | None, softmax: Node | None, av: Node) -> _Scores | str:
    """The product and the bias under the softmax whose bytes `av` reads; else why there is none."""
    module = module_of(graph_module, softmax)
    if weights is None or code_of(graph_module, weights) is None:
        return "its probabilities do not run as bytes"
    if not isinstance(module, nn.Softmax):
        return f"what multiplies the values comes from {operation_of(graph_module, softmax)}, not from the softmax"
    if only_reader(weights) is not av or only_reader(softmax) is not weights:
        return "several nodes read its probabilities"
    shape = shape_of(softmax)
    if shape is None or module.dim not in (-1, len(shape) - 1):
        return "its softmax is not over the last dimension"
    return _product(graph_module, input_of(softmax), shape)


def _product(graph_module: GraphModule, node: Node | None, shape: tuple[int, ...]) -> _Scores | str:
    bias = None
    while node is not None and planned_of(node) is None:
        if only_reader(node) is None:
            return "several nodes read its scores"
        if node.target in SUMS:
            full = _added(graph_module, node, shape)
            if isinstance(full, str):
                return full
            bias = full if bias is None else bias + full
        elif not moves(node) or node.target not in ("view", "reshape"):
            how = operation_of(graph_module, node)
            return f"its scores go through {how} before the softmax, and the kernel only adds a constant to them"
        node = input_of(node)
    if node is None or annotation_of(node).role is not Role.QK or only_reader(node) is None:
        return "scores are not a product of queries and keys on bytes that only the softmax reads"
    return _Scores(node, None if bias is None else bias.contiguous())


def _added(graph_module: GraphModule, node: Node, scores: tuple[int, ...]) -> Tensor | str:
    """The constant that a node adds to scores (B, ..., N, M), or to their view (B / groups, groups, H, N, M), as
    (groups, heads, N, M); else why there is none."""
    constant = constant_of(graph_module, node.args[1]) if len(node.args) == 2 and not node.kwargs else None
    if constant is None:
        return "what is added to its scores depends on the image, and the kernel adds a constant"
    full: tuple[int, ...]
    shape, rows = shape_of(node) or (), scores[-2:]
    if len(scores) == 4 and len(shape) == 5 and shape[2:] == scores[1:]:
        full = (shape[1], *scores[1:])
    elif shape == scores:
        full = (1, *scores[1:])
    else:
        return "something is added to its scores in another shape"
    while constant.ndim > len(full) and len(constant) == 1:
        constant = constant[0]
    try:
        expanded = constant.float().broadcast_to(full)
    except RuntimeError:
        return f"a constant {tuple(constant.shape)} is added to its scores, which is not the same for every image"
    return expanded.reshape(full[0], math.prod(full[1:-2]), *rows)


def _codes(
    graph_module: GraphModule, operands: tuple[Node | None, ...], weights: Node, output: Node | None
) -> AttentionCodes | str:
    """The codes of everything that the kernel reads and writes; else why it cannot."""
    query, key, value = (_code_above(graph_module, operand) for operand in operands)
    probabilities, result = code_of(graph_module, weights), code_of(graph_module, output)
    if query is None or key is None or value is None or probabilities is None:
        return "queries, keys or values do not run as bytes"
    if not (query.identity and key.identity and value.identity):
        return "queries, keys and values need uniform quantizers or codebooks"
    if probabilities.kind == library.CODEBOOK:
        return "the kernel knows no codebook for probabilities: take row-log, as the recipe best does"
    if result is None:
        while output is not None and moves(output):
            output = only_reader(output)
        reader = "several nodes" if output is None else operation_of(graph_module, output)
        return f"the kernel gives bytes, and its result is read in float, by {reader}"
    return AttentionCodes((query, key, value), probabilities, result)


def _code_above(graph_module: GraphModule, node: Node | None) -> ByteCode | None:
    """The code of bytes that have only been moved since they were made."""
    while node is not None and code_of(graph_module, node) is None and moves(node):
        node = input_of(node)
    return code_of(graph_module, node)


def _misfit(query: Node, key: Node, value: Node, av: Node) -> str:
    """Why the kernel cannot take operands of these shapes; "" if it can."""
    shapes = [shape_of(node) for node in (query, key, value, av)]
    if None in shapes:
        return "no shapes are noted of queries, keys and values: compile the model again"
    left, right, values, result = [list(shape or ()) for shape in shapes]
    if len(left) not in (3, 4) or len(right) != len(left):
        return f"queries {left} are not (images, heads, tokens, channels) or (images, tokens, channels)"
    if left[-2] != right[-1]:
        return f"there are {left[-2]} queries and {right[-1]} keys, and the kernel takes as many of one as of the other"
    if values[-1] != left[-1]:
        return f"heads of values have {values[-1]} channels, and those of queries {left[-1]}"
    if values != left or result != left or [*right[:-2], right[-1], right[-2]] != left:
        return f"the shapes noted of queries {left}, keys {right}, values {values} and result {result} do not fit"
    return ""


def _rewrite(graph_module: GraphModule, av: Node, found: _Attention) -> None:
    shape = shape_of(av) or ()
    heads = shape[1] if len(shape) == 4 else 1
    module = SeparateAttention(heads, shape[-1], found.codes, found.bias_ghnn)
    wanted = f"{str(av.target).rpartition('.')[0]}.integer_attention".lstrip(".")
    name = add_module(graph_module, wanted, module)
    with graph_module.graph.inserting_before(found.output):
        fused = graph_module.graph.call_module(name, found.operands)
    fused.meta["tensor_meta"] = found.output.meta["tensor_meta"]
    found.output.replace_all_uses_with(fused)
    layers = (layer_of(node) for node in found.inside if annotation_of(node).layer)
    note_kernel(graph_module, f"attention {library.instruction_set()}", *layers)
    graph_module.graph.eliminate_dead_code()
