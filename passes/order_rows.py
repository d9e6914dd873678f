"""Keep tokens in the order of windows through a whole half block, a rewrite of an `IntegerPlan`.

Swin norms its tokens, cuts them into windows (rolled ones in every second block), lets each attend to itself and puts
them back before it adds the residual. All but the attention treats rows alike, so the rows can be reordered first,

    x + back(proj(attend(qkv(windows(norm(x)))))) = back(windows(x) + proj(attend(qkv(norm(windows(x))))))

bit for bit, and what was a run of views, permutations and rolls is one permutation of rows at either end, which a chain
does as it reads and writes (`passes.fuse_chain`). What merges four tokens before a norm becomes one, too. What does not
fit the pattern, as windows of padded images, stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.runtime.lowered import IntegerAttention
from fxquant.runtime.row_order import ReorderRows
from fxquant.runtime.simulated import QuantizedLinear
from passes.integer_plan import SUMS, IntegerPlan, input_of, moves, only_reader, set_shape, shape_of


def order_rows(plan: IntegerPlan) -> None:
    """Reorder rows before the norms of windowed attention, and before norms of merged tokens."""
    graph = plan.graph_module.graph
    attentions = [node for node in graph.nodes if isinstance(plan.module(node), IntegerAttention)]
    windowed = [node for node in attentions if _is_moved(input_of(input_of(node)))]
    merged = [node for node in graph.nodes if isinstance(plan.module(node), nn.LayerNorm) and _is_moved(input_of(node))]
    if not windowed and not merged:
        return
    image = next(node for node in graph.nodes if node.op == "placeholder")
    batch = (shape_of(image) or (0,))[0]
    _read_batch_size_from(image, batch)
    for node in windowed:
        _window(plan, node, batch)
    for node in merged:
        _merge(plan, node, batch)


def _is_moved(node: Node | None) -> bool:
    return node is not None and moves(node)


def _read_batch_size_from(image: Node, batch: int) -> None:
    """Sizes of the batch come from the image, so that no other tensor is needed for them."""
    graph = image.graph
    own: Node | None = None
    for node in list(graph.nodes):
        source = input_of(node)
        is_shape = node.target is getattr and node.args[1] == "shape" and source is not image
        if not is_shape or source is None or (shape_of(source) or (0,))[0] != batch:
            continue
        for user in [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]:
            if own is None:
                with graph.inserting_after(image):
                    shape = graph.call_function(getattr, (image, "shape"))
                with graph.inserting_after(shape):
                    own = graph.call_function(operator.getitem, (shape, 0))
            user.replace_all_uses_with(own)
            graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)


def _window(plan: IntegerPlan, attention: Node, batch: int) -> None:
    qkv, proj = input_of(attention), only_reader(attention)
    cut, codes = _moved(input_of(qkv), input_of)
    norm = input_of(codes)
    x = input_of(norm)
    if not cut or codes not in plan.made or not isinstance(plan.module(norm), nn.LayerNorm) or x is None:
        return
    if norm is None or codes is None or only_reader(norm) is not codes or len(codes.users) != 1:
        return
    if proj not in plan.nodes or proj is None or not isinstance(plan.module(proj), QuantizedLinear):
        return
    put_back, total = _moved(only_reader(proj), only_reader)
    is_sum = total is not None and total.target in SUMS and len(total.args) == 2 and not total.kwargs
    if plan.nodes[proj].epilogue.kind or not put_back or not is_sum or total is None or qkv is None:
        return
    if set(total.args) != {x, put_back[-1]} or shape_of(x) != shape_of(total):
        return
    there, back = _order(list(reversed(cut)), norm, batch), _order(put_back, proj, batch)
    if there is None or back is None or not there.undone_by(back):
        return
    windows = _insert(plan, f"windows_{norm.name}", there, x, before=norm)
    norm.args = (windows,)
    qkv.args = (codes,)
    total.args = (windows, proj)
    for node in (windows, norm, codes, total):
        set_shape(node, shape_of(proj) or (), like=x)
    with plan.graph_module.graph.inserting_after(total):
        restored = plan.graph_module.graph.call_module(_add(plan, f"image_{norm.name}", back), (total,))
    set_shape(restored, shape_of(x) or (), like=x)
    total.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
    for node in (*cut, *reversed(put_back)):
        plan.graph_module.graph.erase_node(node)


def _merge(plan: IntegerPlan, norm: Node, batch: int) -> None:
    merged, source = _moved(input_of(norm), input_of)
    if not merged or source is None or shape_of(source) is None:
        return
    found = _order(list(reversed(merged)), source, batch)
    if found is None or found.parts == 1:
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


def _order(path: list[Node], source: Node, batch: int) -> ReorderRows | None:
    """What moves do to the rows of `source`; None where they do not permute the rows of each image alike."""
    shape, result = shape_of(source), shape_of(path[-1])
    if shape is None or result is None or result[-1] % shape[-1]:
        return None
    channels, parts = shape[-1], result[-1] // shape[-1]
    start = torch.arange(torch.Size(shape).numel()).view(shape)
    flat = _run(path, start).reshape(-1, channels)
    if flat.numel() != start.numel() or not torch.equal(flat, flat[:, :1] + torch.arange(channels)):
        return None
    if bool((flat[:, 0] % channels).any()) or len(flat) % batch:
        return None
    rows = (flat[:, 0] // channels).view(batch, -1)
    count = rows.shape[1]
    is_alike = torch.equal(rows, rows[:1] + count * torch.arange(batch)[:, None])
    if not is_alike or not torch.equal(rows[0].sort().values, torch.arange(count)):
        return None
    return ReorderRows(rows[0].clone(), result[1:-1], parts)


def _run(path: list[Node], x: Tensor) -> Tensor:
    """The moves, on another tensor of the shape they were traced with."""
    for node in path:
        function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        arguments = [_size(argument) if isinstance(argument, Node) else argument for argument in node.args[1:]]
        x = function(x, *arguments, **node.kwargs)
    return x


def _size(node: Node) -> Any:
    """A size of a tensor, as it was when traced."""
    shape = input_of(node)
    sizes = shape_of(input_of(shape))
    is_size = node.target is operator.getitem and shape is not None and shape.target is getattr
    if not is_size or sizes is None or not isinstance(node.args[1], int):
        return node  # the move fails on it, with torch's own words
    return sizes[node.args[1]]


def _insert(plan: IntegerPlan, name: str, module: ReorderRows, source: Node, before: Node) -> Node:
    with plan.graph_module.graph.inserting_before(before):
        return plan.graph_module.graph.call_module(_add(plan, name, module), (source,))


def _add(plan: IntegerPlan, name: str, module: ReorderRows) -> str:
    plan.graph_module.add_submodule(name, module)
    return name
