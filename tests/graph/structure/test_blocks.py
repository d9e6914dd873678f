"""Blocks: where graphs are cut, and that running blocks one after another is running the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.graph.structure.blocks import cut, extract, remainder
from tests.models import ARCHITECTURES, images, traced, vit

EXPECTED = {
    "vit": ["patch_embed", "block 0", "block 1", "head"],
    "deit distilled": ["patch_embed", "block 0", "block 1", "head"],
    "swin that pads": ["patch_embed", "block 0", "block 1", "reduction", "block 2", "block 3", "head"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_in_a_row_are_the_graph(name: str) -> None:
    model, size = ARCHITECTURES[name]()
    graph_module = traced(model, images(2, size))
    blocks = cut(graph_module)
    assert [block.name for block in blocks] == EXPECTED[name]
    assert [block.source for block in blocks[1:]] == [block.result for block in blocks[:-1]]
    values = {}
    value = x = images(3, size, seed=5)
    with torch.no_grad():
        for block in blocks:
            value = values[block.result] = extract(graph_module, block.source, block.result)(value)
        assert torch.equal(value, graph_module(x))
        for result, expected in values.items():
            whole = extract(graph_module, blocks[0].source, result)(x)
            assert torch.equal(whole, expected), result


class Several(torch.nn.Module):
    """A model that returns several tensors made of its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vit(depth=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, and twice as much."""
        scores = self.inner(x)
        return scores, scores * 2


def test_the_remainder_gives_all_of_the_output() -> None:
    graph_module = traced(Several(), images(2))
    x = images(3, seed=5)
    first = cut(graph_module)[0]
    with torch.no_grad():
        expected = graph_module(x)
        found = remainder(graph_module, first.result)(extract(graph_module, first.source, first.result)(x))
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(KeyError):
        remainder(graph_module, "nowhere")


def test_every_layer_lies_in_exactly_one_block() -> None:
    model, size = ARCHITECTURES["swin"]()
    graph_module = traced(model, images(2, size))
    layers = [
        str(node.target)
        for block in cut(graph_module)
        for node in extract(graph_module, block.source, block.result).graph.nodes
        if node.op == "call_module"
    ]
    whole = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    assert sorted(layers) == sorted(whole)


def test_a_value_that_needs_more_than_the_source() -> None:
    model, size = ARCHITECTURES["vit"]()
    graph_module = traced(model, images(2, size))
    blocks = cut(graph_module)
    with pytest.raises(ValueError, match="cannot be computed from"):
        extract(graph_module, blocks[1].result, blocks[1].source)
