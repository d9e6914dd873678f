from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from fxquant.errors import CalibrationError, PipelineError
from fxquant.graph.annotation import WEIGHT_ROLES, Annotation, Role, annotate, annotation_of, nodes_with_role
from fxquant.quantizers.families import families_named
from fxquant.quantizers.uniform_channels import UniformChannelsQuantizer
from passes.pipeline.contract import PassContext
from passes.recipes import mptq_vit
from passes.search.calibrate import Calibrate
from passes.search.input_weights import coherence
from passes.search.insert_observers import observers_of
from passes.search.search_scales import SearchScales
from tests.models import images, traced, vit
from tests.operands import input_candidates, plan_and_observe, weight_candidates

BITS = (2, 4, 8)


@pytest.fixture(scope="module")
def calibrated() -> GraphModule:
    """Copy before use."""
    graph_module = traced(vit(depth=1), images(2))
    plan_and_observe(graph_module, softmax_input="symmetric", layer_norm_input="o-2sf")
    Calibrate().apply(graph_module, PassContext(images()))
    return graph_module


def searched(graph_module: GraphModule, **options: Any) -> dict[str, Annotation]:
    graph_module = copy.deepcopy(graph_module)
    SearchScales(BITS, **options).apply(graph_module, PassContext())
    return {annotation_of(node).layer: annotation_of(node) for node in nodes_with_role(graph_module)}


def test_candidates_for_every_observed_tensor(calibrated: GraphModule) -> None:
    found = searched(calibrated)
    for node in nodes_with_role(calibrated):
        annotation = found[annotation_of(node).layer]
        assert len(input_candidates(annotation)) == len(observers_of(calibrated, node))
        assert bool(weight_candidates(annotation)) == (annotation.role in WEIGHT_ROLES)
        for group in filter(None, (weight_candidates(annotation), *input_candidates(annotation))):
            assert [candidate.bits for candidate in group] == list(BITS)
            assert all(0 <= candidate.noise < 1.5 * candidate.signal for candidate in group)
            assert all(candidate.loss >= 0 for candidate in group)
            assert group[-1].noise < 0.5 * group[0].noise + 1e-9
            assert group[-1].loss < 0.1 * group[0].loss + 1e-9


def test_mse_has_the_least_noise_and_hessian_the_least_loss(calibrated: GraphModule) -> None:
    by_mse, by_hessian = searched(calibrated, criterion="mse"), searched(calibrated)
    different = 0
    for layer, annotation in by_mse.items():
        pairs = zip(input_candidates(annotation), input_candidates(by_hessian[layer]), strict=True)
        for mse, hessian in ((a, b) for left, right in pairs for a, b in zip(left, right, strict=True)):
            assert mse.noise <= hessian.noise * (1 + 1e-6)
            assert mse.loss == pytest.approx(0.5 * mse.noise / 6)
            different += mse.noise != hessian.noise
    assert different > 3


def test_min_max_covers_the_data(calibrated: GraphModule) -> None:
    graph_module = copy.deepcopy(calibrated)
    fc1 = searched(graph_module, criterion="min-max")["blocks.0.mlp.fc1"]
    (node,) = [n for n in nodes_with_role(graph_module) if annotation_of(n).layer == "blocks.0.mlp.fc1"]
    observer = observers_of(graph_module, node)[0][1]
    largest = max(-observer.minimum, observer.maximum)
    for weight, activation in zip(weight_candidates(fc1), input_candidates(fc1)[0], strict=True):
        top = 2 ** (weight.bits - 1) - 1
        assert float(activation.quantizer.scale) == pytest.approx(largest / top)
        matrix = graph_module.get_submodule("blocks.0.mlp.fc1").weight
        assert torch.allclose(weight.quantizer.scale[:, 0], matrix.abs().amax(1) / top)


def test_hessian_without_gradients_says_what_is_missing() -> None:
    graph_module = traced(vit(depth=1), images(2))
    plan_and_observe(graph_module)
    Calibrate(gradient=False).apply(graph_module, PassContext(images()))
    with pytest.raises(CalibrationError, match=r"needs gradients or output errors, and Calibrate gathered neither"):
        SearchScales(BITS).apply(graph_module, PassContext())
    SearchScales(BITS, criterion="mse").apply(graph_module, PassContext())


class TestTwice:
    def test_needs_another_calibration(self, calibrated: GraphModule) -> None:
        graph_module = copy.deepcopy(calibrated)
        SearchScales(BITS).apply(graph_module, PassContext())
        with pytest.raises(CalibrationError, match="run Calibrate before SearchScales"):
            SearchScales(BITS).apply(graph_module, PassContext())

    def test_is_refused_when_the_pipeline_is_built(self) -> None:
        with pytest.raises(PipelineError, match="'calibrated'"):
            mptq_vit(4).after(SearchScales, SearchScales())

    def test_is_refused_where_only_gram_matrices_are_kept(self) -> None:
        with pytest.raises(PipelineError, match="'calibrated'"):
            mptq_vit(4).replace(SearchScales, SearchScales(keep_grams=True)).after(SearchScales, SearchScales())


@pytest.mark.parametrize("keep_grams", [False, True])
def test_statistics_are_released(calibrated: GraphModule, keep_grams: bool) -> None:
    graph_module = copy.deepcopy(calibrated)
    SearchScales(BITS, keep_grams=keep_grams).apply(graph_module, PassContext())
    grams = 0
    for node in nodes_with_role(graph_module):
        for _, observer in observers_of(graph_module, node):
            assert observer.histogram is None
            assert observer.output_weight is None
            grams += observer.gram is not None
    assert grams == (sum(bool(weight_candidates(annotation_of(n))) for n in nodes_with_role(graph_module)) * keep_grams)


@pytest.mark.parametrize("bits", [(), (4, 3), (4, 4), (1, 4), (4, 9)])
def test_candidate_bits_are_checked(bits: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match="candidate bits"):
        SearchScales(bits)


def test_of_two_families_the_one_of_less_loss_is_taken_at_every_width(calibrated: GraphModule) -> None:
    def losses(family: str) -> list[tuple[float, str]]:
        graph_module = copy.deepcopy(calibrated)
        for node in nodes_with_role(graph_module, Role.AV):
            left, right = annotation_of(node).operands
            annotate(node, operands=(replace(left, families=families_named(family)), right))
            observers_of(graph_module, node)[0][1].families = families_named(family)
        found = input_candidates(searched(graph_module)["blocks.0.attn.av"])[0]
        return [(candidate.loss, candidate.quantizer.kind) for candidate in found]

    either = losses("log2|twin-softmax")
    assert either == [min(pair) for pair in zip(losses("log2"), losses("twin-softmax"), strict=True)]
    assert {kind for _, kind in either} <= {"log2", "shifted-regions"}


def test_output_errors_need_no_gradients() -> None:
    """Weights of the metric are then squared column norms of the weight, whatever the loss."""
    graph_module = traced(vit(depth=1), images(2))
    plan_and_observe(graph_module)
    Calibrate(gradient=False, output_error=True).apply(graph_module, PassContext(images()))
    (node,) = nodes_with_role(graph_module, Role.FC1)
    linear = graph_module.get_submodule(str(node.target))
    moments = observers_of(graph_module, node)[0][1].statistics().moments.moments
    per_token = float(linear.weight.detach().double().square().sum())  # type: ignore[union-attr,operator]
    tokens = moments[0].sum() / linear.in_features  # type: ignore[operator]
    assert moments[3].sum() == pytest.approx(tokens * per_token, rel=1e-4)


def test_only_logarithmic_tables_pay_for_coherent_errors() -> None:
    for family, is_coherent in (("adalog-softmax", True), ("adalog-zero-softmax", True), ("twin-softmax", False)):
        graph_module = traced(vit(depth=1), images(2))
        plan_and_observe(graph_module, post_softmax=family)
        Calibrate(draws=1).apply(graph_module, PassContext(images()))
        (node,) = nodes_with_role(graph_module, Role.AV)
        (_, probabilities), (_, values) = observers_of(graph_module, node)
        assert (probabilities.statistics().coherence > 0) == is_coherent
        assert values.statistics().coherence == 0


def test_coherence_by_hand() -> None:
    equal, opposite = torch.ones(5, 3), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert coherence(equal) == pytest.approx(5), "five equal errors add up to five, their squares to 25 instead of 5"
    assert coherence(opposite) == 0


def test_channels_of_all_weights_but_the_heads_have_widths_of_their_own() -> None:
    """At widths that have both neighbours among the candidates; elsewhere all channels have one."""
    graph_module = traced(vit(depth=1), images(2))
    plan_and_observe(graph_module)
    Calibrate().apply(graph_module, PassContext(images()))
    SearchScales((2, 3, 4, 5), weight_widths="channel", dampening=0.1).apply(graph_module, PassContext())
    mixed = 0
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        for candidate in weight_candidates(annotation):
            quantizer = candidate.quantizer
            is_mixed = annotation.role is not Role.HEAD and candidate.bits in (3, 4)
            assert isinstance(quantizer, UniformChannelsQuantizer) == is_mixed
            mixed += is_mixed and len(quantizer.widths.unique()) > 1
    assert mixed >= 4
    with pytest.raises(CalibrationError, match="weight_widths"):
        SearchScales(weight_widths="channel", weight_scales="tensor")
    with pytest.raises(CalibrationError, match="dampening"):
        SearchScales(dampening=-1.0)
