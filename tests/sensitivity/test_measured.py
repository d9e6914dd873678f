"""Divergence from restarted prefixes against whole models with quantizers substituted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.data import embedded
from fxquant.errors import CalibrationError, SensitivityError
from fxquant.graph.annotation import annotate_operands, annotation_of, planned_nodes
from fxquant.graph.capture.tracing import trace
from fxquant.sensitivity.measured import Assignment, Divergence
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.search.calibrate import Calibrate
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers
from tests.models import ARCHITECTURES, embedded_blocks, images
from tests.operands import weight_candidates

BITS = (3, 6)


def searched(model: nn.Module, images_bchw: Tensor, **plan: Any) -> GraphModule:
    steps = [AssignRoles(), PlanOperands(**plan), InsertObservers(), Calibrate(gradient=False)]
    steps.append(SearchScales(BITS, "mse"))
    return Pipeline(steps).run(trace(model, images_bchw[:2]), PassContext(images_bchw))


def in_float64(graph_module: GraphModule) -> GraphModule:
    """Weights and constants in double; quantizers compute in float32 as ever."""
    return graph_module.double()


def brute_force(graph_module: GraphModule, assignment: Assignment, images_bchw: Tensor) -> float:
    """KL(float || substituted) of two whole models."""
    changed = copy.deepcopy(graph_module)
    by_name = {node.name: node for node in changed.graph.nodes}
    for node, bits in assignment.items():
        annotate_operands(by_name[node.name], bits=bits)
    SubstituteQuantizers().apply(changed, PassContext())
    with torch.no_grad():
        log_p, log_q = (model(images_bchw).log_softmax(1) for model in (graph_module, changed))
    return float(nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))


@pytest.fixture(scope="module", params=["vit", "swin that pads"])
def scrambled(request: pytest.FixtureRequest) -> tuple[GraphModule, Tensor]:
    model, size = ARCHITECTURES[request.param]()
    sample = images(5, size)
    graph_module = searched(model, sample, softmax_input="symmetric", layer_norm_input="o-2sf")
    return in_float64(graph_module), sample.double()


def layers(graph_module: GraphModule) -> list[Node]:
    return planned_nodes(graph_module)


def choice(node: Node, place: int) -> tuple[int | None, ...]:
    """Widths for a layer; neighbours get different ones, so that every kind of layer meets several."""
    return [(None, 6), (3, None), (6, 3)][place % 3] if len(annotation_of(node).operands) == 2 else (3,)


def test_every_layer_equals_the_substituted_model(scrambled: tuple[GraphModule, Tensor]) -> None:
    graph_module, sample = scrambled
    divergence = Divergence(graph_module, sample, batch_size=2)
    for place, node in enumerate(layers(graph_module)):
        bits = choice(node, place)
        expected = brute_force(graph_module, {node: bits}, sample)
        assert divergence.of({node: bits}) == pytest.approx(expected, rel=1e-6, abs=1e-12), annotation_of(node)
        assert expected > 0


def test_a_baseline_and_several_layers_in_any_order(scrambled: tuple[GraphModule, Tensor]) -> None:
    graph_module, sample = scrambled
    nodes = layers(graph_module)
    everything = {node: (6,) * len(annotation_of(node).operands) for node in nodes}
    divergence = Divergence(graph_module, sample, batch_size=3, baseline=everything)
    changes: list[Assignment] = [{nodes[-1]: (3, 3), nodes[4]: (3,)}, {nodes[1]: (None,)}, {}]
    found = divergence.of_each(changes)
    for change, value in zip(changes, found, strict=True):
        assert value == pytest.approx(brute_force(graph_module, {**everything, **change}, sample), rel=1e-6)
    assert [divergence.of(change) for change in changes] == found


def test_nothing_changed_is_zero_and_the_graph_stays_as_it_is(scrambled: tuple[GraphModule, Tensor]) -> None:
    graph_module, sample = scrambled
    before = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    divergence = Divergence(graph_module, sample)
    assert divergence.of({}) == 0
    divergence.of({layers(graph_module)[0]: (3, None)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph_module.state_dict().items())


def test_the_prefix_is_computed_once() -> None:
    """Nodes before a layer run once for all its candidates, and once in all when layers come in graph order."""
    calibration = embedded.calibration_images(8)
    graph_module = searched(embedded_blocks(2), calibration)
    divergence = Divergence(graph_module, calibration, batch_size=4)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    handle = graph_module.get_submodule("blocks.0.attn.qkv").register_forward_hook(count)
    last = [node for node in layers(graph_module) if annotation_of(node).block == 1]
    for node in last:
        divergence.sensitivity(node, range(len(annotation_of(node).operands)))
    handle.remove()
    assert runs == 2, "once per batch"


def test_sensitivity_of_the_embedded_model() -> None:
    """More bits never hurt much; both operands together cost the order of what they cost apart, at any batch size."""
    calibration = embedded.calibration_images(12)
    graph_module = searched(embedded.load_model(), calibration)
    fc1, qk = ([n for n in layers(graph_module) if annotation_of(n).role == role][2] for role in ("fc1", "qk"))
    divergence = Divergence(graph_module, calibration, batch_size=12)
    weight, activation, both = (divergence.sensitivity(fc1, group) for group in ((0,), (1,), (0, 1)))
    assert len(weight) == len(activation) == len(both) == len(BITS)
    for low, high in (weight, activation, both):
        assert 0 < high < low / 4
    assert max(weight[0], activation[0]) / 2 < both[0]
    assert both[0] < 4 * (weight[0] + activation[0])
    assert 0 < divergence.sensitivity(qk, (0,))[0] < 4 * divergence.sensitivity(qk, (0, 1))[0]
    other = Divergence(graph_module, calibration, batch_size=5).sensitivity(fc1, (0, 1))
    assert other == pytest.approx(both, rel=1e-3)


class _WritesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(12, 12), nn.Linear(12, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        kept = hidden * 1
        hidden += 1
        return self.second(self.act(hidden.mul_(2)) + kept)


def test_operations_in_place_do_not_spoil_live_values() -> None:
    torch.manual_seed(0)
    sample = torch.randn(4, 3, 2, 2)
    graph_module = in_float64(searched(_WritesInPlace(), sample))
    first, second = layers(graph_module)
    divergence = Divergence(graph_module, sample.double())
    for node in (first, second, first):
        for bits in ((3, 3), (6, None), (3, 3)):
            expected = brute_force(graph_module, {node: bits}, sample.double())
            assert divergence.of({node: bits}) == pytest.approx(expected, rel=1e-6)


def test_errors_say_what_is_wrong() -> None:
    sample = torch.randn(4, 3, 2, 2)
    graph_module = searched(_WritesInPlace(), sample)
    first, second = layers(graph_module)
    divergence = Divergence(graph_module, sample)
    with pytest.raises(SensitivityError, match=r"first has no candidate of 5 bits there, only \[3, 6\]"):
        divergence.of({first: (5, None)})
    with pytest.raises(SensitivityError, match="not part of the graph"):
        divergence.of({next(iter(copy.deepcopy(graph_module).graph.nodes)): (3, 3)})
    with pytest.raises(CalibrationError, match="class scores"):
        Divergence(searched(nn.Sequential(nn.Conv2d(3, 3, 1)), sample), sample)
    broken = weight_candidates(annotation_of(second))[0]
    broken.quantizer.scale.fill_(float("nan"))
    with pytest.raises(SensitivityError, match=r"not finite with second at \(3, None\)"):
        divergence.of({second: (3, None)})
    with torch.no_grad():
        graph_module.get_submodule("second").bias.fill_(float("nan"))
    with pytest.raises(SensitivityError, match="float model's output is not finite"):
        Divergence(graph_module, sample)
