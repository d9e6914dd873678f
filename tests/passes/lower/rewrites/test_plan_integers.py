"""Where bytes are made: as early as they can be, and only past what the graph notes the shape of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx import GraphModule, Node

from allocators.uniform import Uniform
from fxquant.graph.annotation import Role, annotation_of
from fxquant.graph.nodes import input_of
from fxquant.graph.printer import format_graph
from fxquant.runtime.native import library
from passes.lower.integer_plan import moves
from passes.lower.lower import Lower
from passes.pipeline.contract import PassContext
from passes.recipes import RECIPES
from tests.models import ARCHITECTURES, images, traced

pytestmark = pytest.mark.skipif(library.why_absent() is not None, reason=str(library.why_absent()))


def windows_before(qkv: Node) -> Node:
    """What the last move before a layer moves."""
    move = input_of(qkv)
    assert move is not None
    assert moves(move)
    source = input_of(move)
    assert source is not None
    return source


def lowered(graph_module: GraphModule) -> GraphModule:
    low = copy.deepcopy(graph_module)
    Lower("cpu-native", chains=False).apply(low, PassContext())
    return low


def test_bytes_are_made_where_the_last_shape_is_noted() -> None:
    model, size = ARCHITECTURES["swin"]()
    recipe = RECIPES["naive_min_max"]("W8A8", bits=(8,), allocator=Uniform())
    graph_module = recipe.run(traced(model, images(2, size)), PassContext(images(2, size)))
    before = lowered(graph_module)
    for node in graph_module.graph.nodes:
        if annotation_of(node).role is Role.QKV:
            del windows_before(node).meta["tensor_meta"]  # as in a file that does not note every node's
    after = lowered(graph_module)
    assert format_graph(after).count("ToCodes") > format_graph(before).count("ToCodes")
    x = images(3, size, seed=2)
    with torch.inference_mode():
        assert torch.equal(before(x), after(x))
