"""Correlations of errors against what they are by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.fx import Node

from fxquant.data import embedded
from fxquant.graph.annotation import annotation_of
from fxquant.sensitivity.interactions import Place, correlations, nearest_correlation
from fxquant.sensitivity.measured import Divergence
from tests.sensitivity.test_measured import layers, searched


def at_three_bits(*places: Place) -> dict[Node, tuple[int | None, ...]]:
    found = {node: [None] * len(annotation_of(node).operands) for node, _ in places}
    for node, indices in places:
        for index in indices:
            found[node][index] = 3  # type: ignore[call-overload]
    return {node: tuple(bits) for node, bits in found.items()}


def test_correlations_of_the_strongest_pairs() -> None:
    images = embedded.calibration_images(6)
    graph_module = searched(embedded.load_model(), images)
    divergence = Divergence(graph_module, images)
    nodes = [node for node in layers(graph_module) if annotation_of(node).block == 5]
    places: list[Place] = [(node, group) for node in nodes for group in annotation_of(node).groups if group]
    found = correlations(divergence, places, 3, strongest=4)
    assert len(found) == 6
    assert all(-1 <= r <= 1 for _, _, r in found)
    alone = {place: divergence.of(at_three_bits(place)) for place in places}
    strongest = sorted(alone, key=lambda place: -alone[place])[:4]
    assert {place for first, second, _ in found for place in (first, second)} == set(strongest)
    measured = torch.eye(4, dtype=torch.float64)
    for first, second, _ in found:
        together = divergence.of(at_three_bits(first, second))
        r = (together - alone[first] - alone[second]) / (2 * math.sqrt(alone[first] * alone[second]))
        i, j = strongest.index(first), strongest.index(second)
        measured[i, j] = measured[j, i] = min(max(r, -1), 1)
    expected = nearest_correlation(measured)
    for first, second, r in found:
        assert r == pytest.approx(float(expected[strongest.index(first), strongest.index(second)]), abs=1e-9)


def test_no_combination_of_errors_has_a_negative_cost() -> None:
    impossible = torch.tensor([[1, -0.9, -0.9], [-0.9, 1, -0.9], [-0.9, -0.9, 1]], dtype=torch.float64)
    assert torch.linalg.eigvalsh(impossible)[0] < -0.5
    found = nearest_correlation(impossible)
    assert torch.linalg.eigvalsh(found)[0] > -1e-9
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))
    assert float(found[0, 1]) == pytest.approx(-0.5)
    possible = torch.tensor([[1, 0.3], [0.3, 1]], dtype=torch.float64)
    torch.testing.assert_close(nearest_correlation(possible), possible)
