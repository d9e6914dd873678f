"""Keep tokens in the order of windows through a whole half block, a rewrite of an `IntegerPlan`.

Swin norms its tokens, cuts them into windows (rolled ones in every second block), lets each attend to itself and puts
them back before it adds the residual. All but the attention treats rows alike, so the rows can be reordered first,

    x + back(proj(attend(qkv(windows(norm(x)))))) = back(windows(x) + proj(attend(qkv(norm(windows(x))))))

bit for bit, and what was a run of views, permutations and rolls is one permutation of rows at either end, which a chain
does as it reads and writes (`passes.lower.rewrites.fuse_chain`). What merges four tokens before a norm becomes one,
too. What does not fit the pattern, as windows of padded images, stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.names import add_module
from fxquant.graph.nodes import image_of
from fxquant.runtime.integer.lowered import IntegerAttention
from fxquant.runtime.integer.row_order import ReorderRows
from fxquant.runtime.native.library import MAX_PARTS
from fxquant.runtime.simulated import QuantizedLinear
from passes.lower.batch_shapes import COUNTS, BatchShapes
from passes.lower.integer_plan import SUMS, IntegerPlan, input_of, moves, only_reader, set_shape, shape_of


def moved_norms(graph_module: GraphModule) -> bool:
    """Whether a layer norm is right before or behind something that moves numbers: there may be rows to order."""
    modules = dict(graph_module.named_modules())
    norms = [node for node in graph_module.graph.nodes if isinstance(modules.get(str(node.target)), nn.LayerNorm)]
    return any(_is_moved(input_of(norm)) or any(map(_is_moved, norm.users)) for norm in norms)


def order_rows(plan: IntegerPlan, shapes: BatchShapes) -> None:
    """Reorder rows before the norms of windowed attention, and before norms of merged tokens.

    shapes: of the graph before it was planned; while it is, it cannot run.
    """
    graph = plan.graph_module.graph
    attentions = [node for node in graph.nodes if isinstance(plan.module(node), IntegerAttention)]
    windowed = [node for node in attentions if _is_moved(input_of(input_of(node)))]
    merged = [node for node in graph.nodes if isinstance(plan.module(node), nn.LayerNorm) and _is_moved(input_of(node))]
    if not windowed and not merged:
        return
    _read_batch_size_from_image(plan, shapes)
    for node in windowed:
        _window(plan, node, shapes)
    for node in merged:
        _merge(plan, node, shapes)


def _is_moved(node: Node | None) -> bool:
    return node is not None and moves(node)


def _read_batch_size_from_image(plan: IntegerPlan, shapes: BatchShapes) -> None:
    """So that no other tensor is needed for it."""
    graph = plan.graph_module.graph
    image = image_of(plan.graph_module)
    reads = [node for node in graph.nodes if node.target is operator.getitem and _is_batch_size(node, shapes)]
    reads = [node for node in reads if input_of(input_of(node)) is not image]
    if not reads:
        return
    with graph.inserting_after(image):
        shape = graph.call_function(getattr, (image, "shape"))
    with graph.inserting_after(shape):
        own = graph.call_function(operator.getitem, (shape, 0))
    shapes.copy(own, like=reads[0])
    for node in reads:
        node.replace_all_uses_with(own)
        read = input_of(node)
        graph.erase_node(node)
        if read is not None and not read.users:
            graph.erase_node(read)


def _is_batch_size(node: Node, shapes: BatchShapes) -> bool:
    """Whether a node is the first size of a tensor, and that is the number of images."""
    shape = input_of(node)
    if shape is None or shape.target is not getattr or shape.args[1] != "shape" or node.args[1] != 0:
        return False
    return [values.get(node) for values in shapes.values] == list(COUNTS)


def _window(plan: IntegerPlan, attention: Node, shapes: BatchShapes) -> None:
    qkv, proj = input_of(attention), only_reader(attention)
    cut, codes = _moved(input_of(qkv), input_of)
    norm = input_of(codes)
    x = input_of(norm)
    if not cut or codes not in plan.made or not _norms_rows(plan.module(norm)) or x is None:
        return
    # Nobody may ask for the shape of what changes its shape.
    if norm is None or codes is None or list(norm.users) != [codes] or len(codes.users) != 1:
        return
    if proj not in plan.nodes or proj is None or not isinstance(plan.module(proj), QuantizedLinear):
        return
    put_back, total = _moved(only_reader(proj), only_reader)
    is_sum = total is not None and total.target in SUMS and len(total.args) == 2 and not total.kwargs
    if plan.nodes[proj].epilogue.kind or not put_back or not is_sum or total is None or qkv is None:
        return
    if set(total.args) != {x, put_back[-1]} or shape_of(x) != shape_of(total):
        return
    there, back = _order(list(reversed(cut)), norm, shapes), _order(put_back, proj, shapes)
    if there is None or back is None or not there.undone_by(back):
        return
    windows = _insert(plan, f"windows_{norm.name}", there, x, before=norm)
    norm.args = (windows,)
    qkv.args = (codes,)
    total.args = (windows, proj)
    for node in (windows, norm, codes, total):
        set_shape(node, shape_of(proj) or (), like=x)
    with plan.graph_module.graph.inserting_after(total):
        path = add_module(plan.graph_module, f"image_{norm.name}", back)
        restored = plan.graph_module.graph.call_module(path, (total,))
    set_shape(restored, shape_of(x) or (), like=x)
    shapes.copy(restored, like=x)
    total.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
    for node in (*cut, *reversed(put_back)):
        plan.graph_module.graph.erase_node(node)


def _merge(plan: IntegerPlan, norm: Node, shapes: BatchShapes) -> None:
    merged, source = _moved(input_of(norm), input_of)
    if not merged or source is None or shape_of(source) is None or not _norms_rows(plan.module(norm)):
        return
    found = _order(list(reversed(merged)), source, shapes)
    if found is None or not 1 < found.parts <= MAX_PARTS:
        return
    node = _insert(plan, f"merge_{norm.name}", found, source, before=norm)
    set_shape(node, shape_of(norm) or (), like=source)
    norm.args = (node,)
    for move in merged:
        plan.graph_module.graph.erase_node(move)


def _moved(node: Node | None, following: Callable[[Node | None], Node | None]) -> tuple[list[Node], Node | None]:
    """Moves from this node on, in the order met, each read by one other only; and the first node that is none."""
    met = []
    while node is not None and moves(node) and len(node.users) == 1:
        met.append(node)
        node = following(node)
    return met, node


def _norms_rows(module: nn.Module | None) -> bool:
    return isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1


def _order(path: list[Node], source: Node, shapes: BatchShapes) -> ReorderRows | None:
    """What moves do to the rows of `source`; None where they do not permute the rows of each image alike."""
    start, result = shapes.by_image(source), shapes.by_image(path[-1])
    if start is None or result is None or result[-1] % start[-1]:
        return None
    two, three = (_permutation(path, source, *each) for each in zip(shapes.values, COUNTS, strict=True))
    if two is None or three is None or not torch.equal(two, three):
        return None
    return ReorderRows(two, result[1:-1], result[-1] // start[-1])


def _permutation(path: list[Node], source: Node, values: Mapping[Node, Any], count: int) -> Tensor | None:
    """Which of an image's rows comes where, int64 (n,), if it is the same in each of `count` images."""
    shape = values[source]
    channels = shape[-1]
    start = torch.arange(shape.numel()).view(shape)
    flat = _run(path, start, values).reshape(-1, channels)
    if flat.numel() != start.numel() or not torch.equal(flat, flat[:, :1] + torch.arange(channels)):
        return None
    if bool((flat[:, 0] % channels).any()) or len(flat) % count:
        return None
    rows = (flat[:, 0] // channels).view(count, -1)
    size = rows.shape[1]
    is_alike = torch.equal(rows, rows[:1] + size * torch.arange(count)[:, None])
    return rows[0].clone() if is_alike and torch.equal(rows[0].sort().values, torch.arange(size)) else None


def _run(path: list[Node], x: Tensor, values: Mapping[Node, Any]) -> Tensor:
    """The moves, on another tensor of the same shape."""
    for node in path:
        function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        arguments, keywords = torch.fx.node.map_arg((node.args[1:], node.kwargs), lambda size: values[size])
        x = function(x, *arguments, **keywords)
    return x


def _insert(plan: IntegerPlan, name: str, module: ReorderRows, source: Node, before: Node) -> Node:
    with plan.graph_module.graph.inserting_before(before):
        return plan.graph_module.graph.call_module(add_module(plan.graph_module, name, module), (source,))
