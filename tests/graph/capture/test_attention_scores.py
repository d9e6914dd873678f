"""Scores of attention have one form in the graph, whichever way the model spells them, and the same numbers."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch.fx import Node

from fxquant.graph.capture.tracing import trace
from tests.models import images, scrambled
from tests.passes.lower.spellings import DIRECT, SIZE, Model, rotated, scaled_scores

FACTORS = {"heads outside": 0.3, "masked": 0.3}


def products(graph_module: torch.fx.GraphModule) -> list[tuple[Node, Node]]:
    """The product under each softmax, and what the softmax reads."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and isinstance(graph_module.get_submodule(node.target), nn.Softmax):
            scores = product = node.args[0]
            while product.target is not torch.matmul:
                product = product.args[0]
            found.append((product, scores))
    return found


@pytest.mark.parametrize("name", DIRECT)
def test_one_factor_multiplies_the_queries_and_nothing_else(name: str) -> None:
    model, x = scrambled(Model(DIRECT[name])), images(2)
    graph_module = trace(model, x)
    torch.testing.assert_close(graph_module(x), model(x), rtol=1e-4, atol=1e-5)
    factor = FACTORS.get(name, SIZE**-0.5)
    for product, scores in products(graph_module):
        query, key = product.args
        assert query.target is operator.mul
        assert query.args[1] == pytest.approx(factor)
        assert (key.target, key.args[1:]) == ("transpose", (-2, -1))
        if name in ("heads outside", "masked"):
            assert scores.target is operator.add
            assert (scores.args[0], scores.args[1].op) == (product, "get_attr")
        else:
            assert scores is product


def test_masks_that_are_added_stay_finite() -> None:
    graph_module = trace(scrambled(Model(DIRECT["masked"])), images(2))
    added = [graph_module.get_buffer(scores.args[1].target) for _, scores in products(graph_module)]
    assert all(bool(mask.isfinite().all()) and float(mask.max()) == 0 for mask in added)


def test_factors_of_several_elements_and_those_behind_a_sum_stay() -> None:
    def scaled_sum(m, x):  # type: ignore[no-untyped-def]
        query = m.query(x).unflatten(-1, (3, 8)).transpose(1, 2)
        scores = (query @ query.transpose(-2, -1) + m.bias) * 0.3
        return (scores.softmax(-1) @ query).transpose(1, 2).flatten(2)

    for attend in (scaled_scores, scaled_sum):
        model, x = scrambled(Model(attend)), images(2)
        graph_module = trace(model, x)
        torch.testing.assert_close(graph_module(x), model(x), rtol=1e-4, atol=1e-5)
        assert all(scores is not product for product, scores in products(graph_module))


def test_a_factor_before_something_else_stays_before_it() -> None:
    model, x = scrambled(Model(rotated)), images(2)
    graph_module = trace(model, x)
    assert [product.args[0].args[1] for product, _ in products(graph_module)] == [0.3, 0.3]
    torch.testing.assert_close(graph_module(x), model(x), rtol=1e-4, atol=1e-5)
