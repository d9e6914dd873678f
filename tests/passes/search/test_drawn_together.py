"""Predicted losses of weights drawn to their mean."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from torch.fx import GraphModule

import fxquant
from fxquant.errors import CalibrationError
from fxquant.graph.annotation import Candidate, annotation_of, nodes_with_role
from fxquant.quantizers.uniform import UniformQuantizer
from passes.pipeline.contract import PassContext
from passes.recipes import best
from passes.search.calibrate import Calibrate
from passes.search.drawn_together import drawn_together
from passes.search.search_scales import SearchScales
from tests.models import images, traced, vit
from tests.operands import input_candidates, plan_and_observe, weight_candidates

pytestmark = pytest.mark.quick


def candidates_of(*losses: float) -> tuple[Candidate, ...]:
    quantizer = UniformQuantizer(4, 0.1)
    return tuple(Candidate(bits, quantizer, loss, 1.0, 2.0) for bits, loss in enumerate(losses, 3))


def test_by_hand() -> None:
    """Losses by element of 1 and 16, elements alike: half way in logarithms both are drawn by a factor of two."""
    found = [candidates_of(4.0, 1.0), candidates_of(64.0, 16.0), candidates_of(0.0, 0.0)]
    drawn = drawn_together(found, [10, 10, 10], 0.5)
    assert [[c.loss for c in each] for each in drawn[:2]] == [pytest.approx([8.0, 2.0]), pytest.approx([32.0, 8.0])]
    assert drawn[2] is found[2]
    assert [each.noise for each in drawn[0]] == [1.0, 1.0]
    assert drawn_together(found, [10, 10, 10], 0.0) == found
    assert drawn_together(found[2:], [10], 0.5) == found[2:]


@pytest.fixture(scope="module")
def calibrated() -> GraphModule:
    graph_module = traced(vit(depth=2), images(2))
    plan_and_observe(graph_module)
    Calibrate().apply(graph_module, PassContext(images()))
    return graph_module


def test_weights_come_closer_to_one_another_and_nothing_else_changes(calibrated: GraphModule) -> None:
    found = []
    for shrinkage in (0.0, 0.75):
        graph_module = copy.deepcopy(calibrated)
        SearchScales((3, 4, 5), shrinkage=shrinkage).apply(graph_module, PassContext())
        found.append([annotation_of(node) for node in nodes_with_role(graph_module)])
    spreads = []
    for every in found:
        weighed = [a for a in every if a.weight is not None]
        losses = [[c.loss for c in weight_candidates(a)] for a in weighed]
        elements = [a.weight.elements for a in weighed]
        spreads.append(np.ptp(np.log(losses).mean(1) - np.log(elements)))
    assert spreads[0] > 1
    assert spreads[1] == pytest.approx(0.25 * spreads[0])
    for plain, drawn in zip(*found, strict=True):
        of_inputs = [[[c.loss for c in group] for group in input_candidates(a)] for a in (plain, drawn)]
        assert of_inputs[0] == of_inputs[1]


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1])
def test_shrinkage_is_a_share(shrinkage: float) -> None:
    with pytest.raises(CalibrationError, match="shrinkage"):
        SearchScales(shrinkage=shrinkage)


def test_best_draws_them_together_and_says_so_everywhere() -> None:
    """The mean is met all the same, bits differ from those that losses as predicted would get, and sums agree."""
    recipe = best("W5A8")
    plain = recipe.changed(SearchScales, shrinkage=0.0)
    drawn, found = (fxquant.compile(vit(), None, calibration=images(), recipe=each) for each in (recipe, plain))
    for each in (drawn, found):
        rows = [row for row in each.layers if row.weight_bits]
        assert sum(row.parameters * (row.weight_bits or 0) for row in rows) <= 5 * sum(row.parameters for row in rows)
        assert each.allocation is not None
        # Rows count the image's loss too, which is no choice.
        total = sum(row.predicted_loss for row in each.layers)
        assert 0.8 * total < each.allocation.objective <= total
    spread = [np.std([row.weight_bits for row in each.layers if row.weight]) for each in (drawn, found)]
    assert spread[0] < spread[1]
