"""Losses of weights drawn to their mean before bits are chosen by them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fxquant
from fxquant.errors import BudgetError
from fxquant.graph.annotation import annotation_of, planned_nodes
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.build_table import build_table, drawn_together
from passes.pipeline.contract import PassContext
from passes.recipes import best
from passes.search.search_scales import SearchScales
from tests.models import images, traced, vit
from tests.operands import plan_and_observe

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def annotations() -> list:
    graph_module = traced(vit(depth=2), images(2))
    plan_and_observe(graph_module)
    recipe = best("W4A4")
    calibrate = next(step for step in recipe if type(step).__name__ == "Calibrate")
    calibrate.apply(graph_module, PassContext(images()))
    SearchScales((3, 4, 5)).apply(graph_module, PassContext())
    return [annotation_of(node) for node in planned_nodes(graph_module)]


def test_weights_come_closer_to_one_another_and_nothing_else_changes(annotations: list) -> None:
    table = build_table(annotations, (3, 4, 5), 8)
    are_weights = np.array([annotation.weight is not None for annotation in annotations])
    per_element = table.cost[0, are_weights, 1] / table.elements[0, are_weights]
    assert drawn_together(table, annotations, 0.0) is table
    for shrinkage in (0.5, 0.75, 1.0):
        drawn = drawn_together(table, annotations, shrinkage)
        assert np.array_equal(drawn.cost[1], table.cost[1])
        assert np.array_equal(drawn.cost[0, ~are_weights], table.cost[0, ~are_weights])
        ratio = drawn.cost[0, are_weights] / table.cost[0, are_weights]
        assert np.allclose(ratio, ratio[:, :1])  # from width to width they fall as before
        logarithms = np.log(drawn.cost[0, are_weights]).mean(1) - np.log(drawn.elements[0, are_weights])
        before = np.log(table.cost[0, are_weights]).mean(1) - np.log(table.elements[0, are_weights])
        assert np.ptp(logarithms) == pytest.approx((1 - shrinkage) * np.ptp(before), abs=1e-9)
        mean = [np.average(each, weights=table.elements[0, are_weights]) for each in (before, logarithms)]
        assert mean[0] == pytest.approx(mean[1])
    assert np.ptp(np.log(per_element)) > 1


def test_costs_of_zero_are_left_alone(annotations: list) -> None:
    table = build_table(annotations, (3, 4, 5), 8)
    nothing = replace(table, cost=np.zeros_like(table.cost))
    assert np.array_equal(drawn_together(nothing, annotations, 0.75).cost, nothing.cost)


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1])
def test_shrinkage_is_a_share(shrinkage: float) -> None:
    with pytest.raises(BudgetError, match="shrinkage"):
        AllocateBits("W4A4", shrinkage=shrinkage)


def test_best_draws_them_together() -> None:
    """The mean is met all the same, and bits differ from those that losses taken as they are would get."""
    recipe = best("W5A8")
    plain = recipe.changed(AllocateBits, shrinkage=0.0)
    drawn, found = (fxquant.compile(vit(), None, calibration=images(), recipe=each) for each in (recipe, plain))
    for each in (drawn, found):
        rows = [row for row in each.layers if row.weight_bits]
        assert sum(row.parameters * (row.weight_bits or 0) for row in rows) <= 5 * sum(row.parameters for row in rows)
    spread = [np.std([row.weight_bits for row in each.layers if row.weight]) for each in (drawn, found)]
    assert spread[0] < spread[1]
