"""Mix-QViT's metric and recipe on the embedded model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import fxquant
from fxquant.artefact.cache import Cache
from fxquant.data import embedded
from fxquant.errors import OverrideError, PipelineError, SensitivityError
from fxquant.graph.annotation import Annotation, annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.sensitivity.measured import Divergence
from fxquant.sensitivity.relevance import Relevance
from passes.allocate.allocate_bits import ALLOCATION, AllocateBits
from passes.allocate.relevance_sensitivity import RelevanceSensitivity
from passes.allocate.score_layers import ScoreLayers
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import mix_qvit, naive_min_max
from passes.search.insert_observers import observers_of

BITS = (3, 4, 8)
IMAGES = embedded.calibration_images(6)


def recipe(**options: Any) -> Pipeline:
    return mix_qvit(options.pop("budget", "MP4"), base=naive_min_max, bits=BITS, **options)


@pytest.fixture(scope="module")
def searched() -> GraphModule:
    """Copy before use."""
    pipeline = recipe()
    return pipeline[: pipeline.position(ScoreLayers)].run(trace(embedded.load_model(), IMAGES[:2]), PassContext(IMAGES))


@pytest.fixture(scope="module")
def cache() -> Cache:
    return Cache()


def scored(searched: GraphModule, cache: Cache, **options: Any) -> dict[str, Annotation]:
    graph_module = copy.deepcopy(searched)
    context = PassContext(IMAGES, cache=cache)
    ScoreLayers(RelevanceSensitivity(**options), roles=None).apply(graph_module, context)
    return {
        annotation_of(node).layer: annotation_of(node)
        for node in nodes_with_role(graph_module)
        if observers_of(graph_module, node)
    }


def test_the_product_is_importance_times_sensitivity(searched: GraphModule, cache: Cache) -> None:
    """Against both measured here, on a copy; importance in units of the mean layer."""
    product = scored(searched, cache)
    divergence = Divergence(searched, IMAGES)
    importance = Relevance(searched).importance([IMAGES])
    for node in nodes_with_role(searched):
        layer = annotation_of(node).layer
        if layer not in product or annotation_of(node).block not in (None, 3):
            continue
        factor = importance[layer] * len(importance)
        for group in filter(None, annotation_of(node).groups):
            found = divergence.sensitivity(node, group)
            scores = zip(*(product[layer].operands[index].scores for index in group), strict=True)
            assert [sum(values) for values in scores] == pytest.approx([factor * v for v in found], rel=1e-3)


def test_either_alone(searched: GraphModule, cache: Cache) -> None:
    product = scored(searched, cache)
    relevance = scored(searched, cache, sensitivity="none")
    sensitivity = scored(searched, cache, importance="none")
    for layer, annotation in product.items():
        alone = relevance[layer].operands[-1].scores
        assert alone == pytest.approx([4.0 ** (BITS[0] - b) * alone[0] for b in BITS])
        factor = alone[0] * 4.0 ** BITS[0] * (1 + annotation.operands[-1].tied)
        expected = [factor * value for value in sensitivity[layer].operands[-1].scores]
        assert annotation.operands[-1].scores == pytest.approx(expected)
    with pytest.raises(SensitivityError, match="both left out"):
        RelevanceSensitivity("none", "none")


def test_together_and_at_a_baseline(searched: GraphModule) -> None:
    """Halves add up to the layer's divergence with every other layer at the baseline."""
    found = scored(searched, Cache(), importance="none", operands="together", baseline_bits=4)
    everything = {}
    for node in nodes_with_role(searched):
        if annotation_of(node).layer in found:
            layer = annotation_of(node).layer
            everything[node] = (4, 8) if layer == "patch_embed.proj" else (4, 4)
    divergence = Divergence(searched, IMAGES, 8, everything)
    for node in everything:
        annotation = found[annotation_of(node).layer]
        if annotation.layer not in ("blocks.2.mlp.fc1", "blocks.0.attn.av"):
            continue
        halves = zip(*(operand.scores for operand in annotation.operands), strict=True)
        assert [sum(pair) for pair in halves] == pytest.approx(divergence.sensitivity(node, (0, 1)), rel=1e-6)


def test_a_run_that_stopped_goes_on_where_it_was(
    searched: GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensitivity_of, measured = Divergence.sensitivity, []
    stop_after = 5

    def counted(divergence: Divergence, node: Any, *places: Any, **options: Any) -> Any:
        if len(measured) == stop_after:
            raise KeyboardInterrupt
        measured.append(annotation_of(node).layer)
        return sensitivity_of(divergence, node, *places, **options)

    monkeypatch.setattr(Divergence, "sensitivity", counted)
    with pytest.raises(KeyboardInterrupt):
        scored(searched, Cache(tmp_path), importance="none")
    done, measured[:], stop_after = list(measured), [], 1000
    found = scored(searched, Cache(tmp_path), importance="none")
    assert not set(done) & set(measured)
    assert set(done) | set(measured) == set(found)
    measured.clear()
    again = scored(searched, Cache(tmp_path), importance="relevance")
    assert not measured, "the product takes the sensitivities of the run before"
    assert len(again) == len(found)


def test_the_recipe_meets_both_limits_of_the_uniform_model() -> None:
    quantized = fxquant.compile(embedded.load_model(), None, calibration=IMAGES, recipe=recipe(sensitivity="none"))
    uniform = fxquant.compile(embedded.load_model(), None, calibration=IMAGES, recipe=naive_min_max("W4A4", bits=BITS))
    assert quantized.allocation is not None
    assert uniform.allocation is not None
    assert len({row.weight_bits for row in quantized.layers}) > 1
    for name in ("weight_bytes", "bit_operations"):
        limit = uniform.allocation.usage[name]
        assert 0.9 * limit < quantized.allocation.usage[name] <= limit
    assert "MP4" in str(quantized.report())
    with torch.no_grad():
        assert torch.isfinite(quantized(IMAGES)).all()


def test_ties_optimisations_and_errors() -> None:
    tied = recipe(operands="together")
    assert tied[tied.position(AllocateBits)].allocator.tie_weights_and_activations  # type: ignore[union-attr]
    closed = [type(step).__name__ for step in recipe(optimise="closed-form")]
    assert closed.index("CorrectWeights") == closed.index("AllocateBits") + 1
    with pytest.raises(PipelineError, match="optimise must be 'none' or 'closed-form' or 'reconstruct'"):
        recipe(optimise="magic")
    with pytest.raises(OverrideError, match="MP5 asks for a uniform model of 5 bits"):
        fxquant.compile(embedded.load_model(), None, calibration=IMAGES, recipe=recipe(budget="MP5"))
    assert ALLOCATION.get(trace(embedded.load_model(), IMAGES[:2])) is None
