"""Correlations of errors against what they are by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.data import embedded
from fxquant.graph.annotation import annotation_of
from fxquant.sensitivity.interactions import Operand, correlations, nearest_correlation
from fxquant.sensitivity.measured import Divergence
from tests.sensitivity.test_measured import layers, searched


def test_correlations_of_the_strongest_pairs() -> None:
    images = embedded.calibration_images(6)
    graph_module = searched(embedded.load_model(), images)
    divergence = Divergence(graph_module, images)
    nodes = [node for node in layers(graph_module) if annotation_of(node).block == 5]
    operands: list[Operand] = [(node, "activation") for node in nodes]
    operands += [(node, "weight") for node in nodes if annotation_of(node).weight_candidates]
    found = correlations(divergence, operands, 3, strongest=4)
    assert len(found) == 6
    assert all(-1 <= r <= 1 for _, _, r in found)
    alone = {
        (annotation_of(node).layer, name): divergence.of({node: (None, 3) if name == "activation" else (3, None)})
        for node, name in operands
    }
    strongest = sorted(alone, key=lambda operand: -alone[operand])[:4]
    assert {operand for first, second, _ in found for operand in (first, second)} == set(strongest)
    by_name = {annotation_of(node).layer: node for node in nodes}
    measured = torch.eye(4, dtype=torch.float64)
    for first, second, _ in found:
        bits = {by_name[layer]: [None, None] for layer, _ in (first, second)}
        for layer, name in (first, second):
            bits[by_name[layer]][name == "activation"] = 3  # type: ignore[call-overload]
        together = divergence.of({node: (pair[0], pair[1]) for node, pair in bits.items()})
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
