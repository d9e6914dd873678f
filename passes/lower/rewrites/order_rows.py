"""OrderRows: keep tokens in the order of windows through a whole half block.

Swin norms its tokens, cuts them into windows (rolled ones in every second block), lets each attend to itself and puts
them back before it adds the residual. All but the attention treats rows alike, so the rows can be reordered first,

    x + back(proj(attend(qkv(windows(norm(x)))))) = back(windows(x) + proj(attend(qkv(norm(windows(x))))))

bit for bit, and what was a run of views, permutations and rolls is one permutation of rows at either end, which a chain
does as it reads and writes (`passes.lower.rewrites.fuse_chains`). What merges four tokens before a norm becomes one,
too. What does not fit the pattern, as windows of padded images, stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.facts import Fact
from fxquant.graph.names import add_module
from fxquant.graph.nodes import image_of, input_of, module_of, only_reader
from fxquant.runtime.integer.lowered import IntegerAttention
from fxquant.runtime.integer.row_order import ReorderRows
from fxquant.runtime.native.library import MAX_PARTS
from fxquant.runtime.simulated import QuantizedLinear
from passes.lower.batch_shapes import batch_values, by_image, copy_batch_values, has_batch_shapes
from passes.lower.integer_plan import SUMS, code_of, layer_of, moves, planned_of, set_shape, shape_of
from passes.lower.moved import COUNTS, run_moves
from passes.lower.rewrite import REQUIRES, Miss, note_misses
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class _Branch:
    """The nodes of a half block that attends in windows.

    x: what is normed. cut: moves to windows, in the order in which they run. put_back: moves back. total: the sum of x
    and what came back.
    """

    x: Node
    norm: Node
    codes: Node
    cut: tuple[Node, ...]
    qkv: Node
    proj: Node
    put_back: tuple[Node, ...]
    total: Node


@dataclass(frozen=True)
class _Windows:
    """A match. there, back: what the moves of the branch do to rows."""

    branch: _Branch
    there: ReorderRows
    back: ReorderRows


@dataclass(frozen=True)
class _Merge:
    """A match: moves of `source` before a norm, and what they do to rows."""

    source: Node
    moves: tuple[Node, ...]
    order: ReorderRows


@dataclass(frozen=True)
class OrderRows:
    """Reorder rows before the norms of windowed attention, and before norms of merged tokens."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Reorder in place; returns how many orders there are."""
        nodes = list(graph_module.graph.nodes)
        attentions = [node for node in nodes if isinstance(module_of(graph_module, node), IntegerAttention)]
        windowed = [node for node in attentions if moves(input_of(input_of(node)))]
        norms = [node for node in nodes if isinstance(module_of(graph_module, node), nn.LayerNorm)]
        merged = [node for node in norms if moves(input_of(node))]
        if not has_batch_shapes(graph_module) or not (windowed or merged):
            return 0
        _read_batch_size_from_image(graph_module)
        misses, ordered = [], 0
        for node in windowed:
            windows = _match_windows(graph_module, node)
            if isinstance(windows, Miss):
                misses.append(windows)
                continue
            _order_windows(graph_module, windows)
            ordered += 1
        for node in merged:
            merge = _match_merge(graph_module, node)
            if isinstance(merge, Miss):
                misses.append(merge)
                continue
            _order_merge(graph_module, node, merge)
            ordered += 1
        note_misses(context, self, misses)
        return ordered


def _read_batch_size_from_image(graph_module: GraphModule) -> None:
    """So that no other tensor is needed for it."""
    graph = graph_module.graph
    image = image_of(graph_module)
    reads = [node for node in graph.nodes if node.target is operator.getitem and _is_batch_size(node)]
    reads = [node for node in reads if input_of(input_of(node)) is not image]
    if not reads:
        return
    with graph.inserting_after(image):
        shape = graph.call_function(getattr, (image, "shape"))
    with graph.inserting_after(shape):
        own = graph.call_function(operator.getitem, (shape, 0))
    copy_batch_values(own, like=reads[0])
    for node in reads:
        node.replace_all_uses_with(own)
        read = input_of(node)
        graph.erase_node(node)
        if read is not None and not read.users:
            graph.erase_node(read)


def _is_batch_size(node: Node) -> bool:
    """Whether a node is the first size of a tensor, and that is the number of images."""
    shape = input_of(node)
    if shape is None or shape.target is not getattr or shape.args[1] != "shape" or node.args[1] != 0:
        return False
    return batch_values(node) == COUNTS


def _match_windows(graph_module: GraphModule, attention: Node) -> _Windows | Miss:
    branch = _branch(graph_module, attention)
    if isinstance(branch, Miss):
        return branch
    there, back = _order(branch.cut, branch.norm), _order(branch.put_back, branch.proj)
    if there is None or back is None:
        return Miss(
            layer_of(branch.qkv), "windows are no permutation of an image's rows, as where it is padded to them"
        )
    if not there.undone_by(back):
        return Miss(layer_of(branch.qkv), "tokens do not come back to where they were")
    return _Windows(branch, there, back)


def _branch(graph_module: GraphModule, attention: Node) -> _Branch | Miss:
    """The half block around an attention, if it has one norm, one residual, and nobody else reads what is between."""
    qkv, proj = input_of(attention), only_reader(attention)
    layer = layer_of(qkv)
    cut, codes = _moved(input_of(qkv), input_of)
    norm = input_of(codes)
    x = input_of(norm)
    if not cut or code_of(graph_module, codes) is None or not _norms_rows(module_of(graph_module, norm)) or x is None:
        return Miss(layer, "its windows are not cut from what a layer norm gives")
    # Nobody may ask for the shape of what changes its shape.
    if norm is None or codes is None or list(norm.users) != [codes] or len(codes.users) != 1:
        return Miss(layer, "something else reads the layer norm before its windows, or asks for its shape")
    planned = planned_of(proj)
    if proj is None or planned is None or not isinstance(module_of(graph_module, proj), QuantizedLinear):
        return Miss(layer, "no linear layer that runs as integers is behind the attention")
    put_back, total = _moved(only_reader(proj), only_reader)
    is_sum = total is not None and total.target in SUMS and len(total.args) == 2 and not total.kwargs
    if planned.epilogue.kind or not put_back or not is_sum or total is None or qkv is None:
        return Miss(layer, "its windows are not put back and added to a residual")
    if set(total.args) != {x, put_back[-1]} or shape_of(x) != shape_of(total):
        return Miss(layer, "its windows are not added to what was normed")
    return _Branch(x, norm, codes, tuple(reversed(cut)), qkv, proj, tuple(put_back), total)


def _order_windows(graph_module: GraphModule, found: _Windows) -> None:
    b = found.branch
    windows = _insert(graph_module, f"windows_{b.norm.name}", found.there, b.x, before=b.norm)
    b.norm.args = (windows,)
    b.qkv.args = (b.codes,)
    b.total.args = (windows, b.proj)
    for node in (windows, b.norm, b.codes, b.total):
        set_shape(node, shape_of(b.proj) or (), like=b.x)
    with graph_module.graph.inserting_after(b.total):
        path = add_module(graph_module, f"image_{b.norm.name}", found.back)
        restored = graph_module.graph.call_module(path, (b.total,))
    set_shape(restored, shape_of(b.x) or (), like=b.x)
    copy_batch_values(restored, like=b.x)
    b.total.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
    for node in (*reversed(b.cut), *reversed(b.put_back)):
        graph_module.graph.erase_node(node)


def _match_merge(graph_module: GraphModule, norm: Node) -> _Merge | Miss:
    merged, source = _moved(input_of(norm), input_of)
    is_norm = _norms_rows(module_of(graph_module, norm))
    if not merged or source is None or shape_of(source) is None or not is_norm:
        return Miss(layer_of(norm), "what it norms is read by others too, or has no noted shape")
    path = tuple(reversed(merged))
    found = _order(path, source)
    if found is None or not 1 < found.parts <= MAX_PARTS:
        return Miss(layer_of(norm), f"what it norms is not made of 2 to {MAX_PARTS} rows side by side")
    return _Merge(source, path, found)


def _order_merge(graph_module: GraphModule, norm: Node, found: _Merge) -> None:
    node = _insert(graph_module, f"merge_{norm.name}", found.order, found.source, before=norm)
    set_shape(node, shape_of(norm) or (), like=found.source)
    norm.args = (node,)
    for move in reversed(found.moves):
        graph_module.graph.erase_node(move)


def _moved(node: Node | None, following: Callable[[Node | None], Node | None]) -> tuple[list[Node], Node | None]:
    """Moves from this node on, in the order met, each read by one other only; and the first node that is none."""
    met = []
    while node is not None and moves(node) and len(node.users) == 1:
        met.append(node)
        node = following(node)
    return met, node


def _norms_rows(module: nn.Module | None) -> bool:
    return isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1


def _order(path: tuple[Node, ...], source: Node) -> ReorderRows | None:
    """What moves do to the rows of `source`; None where they do not permute the rows of each image alike."""
    start, result = by_image(source), by_image(path[-1])
    if start is None or result is None or result[-1] % start[-1]:
        return None
    two, three = (_permutation(path, source, place) for place in range(len(COUNTS)))
    if two is None or three is None or not torch.equal(two, three):
        return None
    return ReorderRows(two, result[1:-1], result[-1] // start[-1])


def _permutation(path: tuple[Node, ...], source: Node, place: int) -> Tensor | None:
    """Which of an image's rows comes where, int64 (n,), if it is the same in each of COUNTS[place] images."""
    shape = batch_values(source)[place]
    count, channels = COUNTS[place], shape[-1]
    start = torch.arange(shape.numel()).view(shape)
    flat = run_moves(path, start, lambda size: batch_values(size)[place]).reshape(-1, channels)
    if flat.numel() != start.numel() or not torch.equal(flat, flat[:, :1] + torch.arange(channels)):
        return None
    if bool((flat[:, 0] % channels).any()) or len(flat) % count:
        return None
    rows = (flat[:, 0] // channels).view(count, -1)
    size = rows.shape[1]
    is_alike = torch.equal(rows, rows[:1] + size * torch.arange(count)[:, None])
    return rows[0].clone() if is_alike and torch.equal(rows[0].sort().values, torch.arange(size)) else None


def _insert(graph_module: GraphModule, name: str, module: ReorderRows, source: Node, before: Node) -> Node:
    with graph_module.graph.inserting_before(before):
        return graph_module.graph.call_module(add_module(graph_module, name, module), (source,))
