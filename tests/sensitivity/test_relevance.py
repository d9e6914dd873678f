"""Relevance: outputs unchanged, every rule against its formula, and the logit conserved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxquant.data import embedded
from fxquant.errors import CalibrationError, SensitivityError
from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.sensitivity.relevance import Relevance, rewritten
from tests.conformance.architectures import TRANSFORMERS
from tests.models import ARCHITECTURES, images, scrambled, timm_model, traced

NAMES = [*ARCHITECTURES, "swinv2_tiny_window8_256", "eva02_tiny_patch14_224", "vit_base_patch16_clip_quickgelu_224"]


def built(name: str) -> tuple[GraphModule, Tensor]:
    if name in ARCHITECTURES:
        model, size = ARCHITECTURES[name]()
    else:
        (row,) = (row for row in TRANSFORMERS if row.name == name)
        model, size = timm_model(name, **row.options), row.size
    return traced(model, images(2, size)).double(), images(2, size).double()


@pytest.mark.parametrize("name", NAMES)
def test_the_logit_is_conserved(name: str) -> None:
    """Within 1e-7 of its parts' size in float64; every rule that leaked or doubled relevance would show."""
    graph_module, sample = built(name)
    relevance = Relevance(graph_module)
    with torch.no_grad():
        expected = graph_module(sample)
        torch.testing.assert_close(relevance.graph_module(sample), expected, rtol=1e-9, atol=1e-9)
    balance = relevance.balance(sample)
    assert balance.logit == pytest.approx(float(expected.amax(1).sum()))
    parts = (balance.image, balance.biases, balance.constants, balance.softmax)
    assert abs(balance.unexplained) < 1e-7 * sum(map(abs, parts))
    assert min(map(abs, (balance.image, balance.biases))) > 1e-6


@pytest.mark.parametrize("spoilt", ["norm", "act", "matmul"])
def test_without_one_rule_the_logit_is_not_conserved(spoilt: str) -> None:
    graph_module, sample = built("vit")
    relevance = Relevance(graph_module)
    nodes = {node.name: node for node in relevance.graph_module.graph.nodes}
    given = [node for node in graph_module.graph.nodes if spoilt in node.name]
    assert given
    for node in given:
        changed = nodes[node.name]
        assert changed.target != node.target
        changed.op, changed.target = node.op, node.target
        changed.args = map_arg(node.args, lambda source: nodes[source.name])
    balance = relevance.balance(sample)
    assert abs(balance.unexplained) > 1e-3 * abs(balance.logit)


def test_linear_layers_follow_the_epsilon_rule() -> None:
    """R_i = sum_j x_i W_ji / z_j R_j, z with its bias, written out for an MLP; GELU passes R on unchanged."""
    model = scrambled(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 5)))
    sample = images(3, 2).double()
    graph_module = traced(model, sample.float()).double()
    first, second = graph_module.get_submodule("1"), graph_module.get_submodule("3")
    x = sample.flatten(1)
    hidden = first(x)
    active = nn.functional.gelu(hidden)
    logits = second(active)
    relevance = torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), logits.amax(1, keepdim=True))
    at_active = active * ((relevance / logits) @ second.weight)
    at_input = x * ((at_active / hidden) @ first.weight)
    found = Relevance(graph_module).of(sample)
    torch.testing.assert_close(found["3"], relevance)
    torch.testing.assert_close(found["1"], at_active)
    torch.testing.assert_close(found[""], at_input.reshape(sample.shape))


class _WritesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(12, 12), nn.Linear(12, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        kept = hidden * 1
        hidden += 1
        return self.second(self.act(hidden.mul_(2)) + kept)


def test_operations_in_place_are_relieved_of_it() -> None:
    """Relevance of a layer is that of its own output, not of what was later added to it; no softmax is needed."""
    sample = images(3, 2).double()
    graph_module = traced(scrambled(_WritesInPlace()), sample.float()).double()
    expected = graph_module.get_submodule("first")(sample.flatten(1))
    relevance = Relevance(graph_module)
    # The two paths of `first`: doubled where ReLU lets it pass, and kept.
    logits = graph_module(sample)
    weight = graph_module.get_submodule("second").weight[logits.argmax(1)]
    torch.testing.assert_close(relevance.of(sample)["first"], expected * weight * (2.0 * (expected + 1 > 0) + 1))
    balance = relevance.balance(sample)
    assert balance.softmax == 0
    # The number 1 that is added is a constant no tensor holds.
    added = float((weight * 2.0 * (expected + 1 > 0)).sum())
    assert balance.unexplained == pytest.approx(added)


def test_softmax_and_matmul_follow_their_rules() -> None:
    """Of one attention, from its output's relevance: half to either operand, then R_i = x_i (R_i - s_i sum R)."""
    graph_module, sample = built("vit")
    relevance = Relevance(graph_module)
    found = relevance.of(sample)
    values: dict[str, Tensor] = {}
    _Keep(relevance.graph_module, values).run(sample)
    layer = "blocks.1.attn."
    probability, scores = values[layer + "softmax"], values[layer + "qk"]
    at_softmax = found[layer + "softmax"]
    torch.testing.assert_close(found[layer + "av"].sum(), 2 * at_softmax.sum())
    expected = scores * (at_softmax - probability * at_softmax.sum(-1, keepdim=True))
    torch.testing.assert_close(found[layer + "qk"], expected, atol=1e-12, rtol=1e-9)


class _Keep(Interpreter):
    def __init__(self, graph_module: GraphModule, values: dict[str, Tensor]) -> None:
        super().__init__(graph_module)
        self.values = values

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if annotation_of(n).layer:
            self.values[annotation_of(n).layer] = result
        return result


def test_importance_of_the_embedded_model() -> None:
    """Sums to 1, has every layer that multiplies, does not depend on the batch size, leaves the graph alone."""
    sample = embedded.calibration_images(12)
    graph_module = traced(embedded.load_model(), sample)
    before = graph_module.code, {name: value.clone() for name, value in graph_module.state_dict().items()}
    relevance = Relevance(graph_module)
    found = relevance.importance(sample.split(12))
    assert list(found) == [
        annotation_of(node).layer for node in nodes_with_role(graph_module) if annotation_of(node).macs
    ]
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) > 1e-4
    assert relevance.importance(sample.split(5)) == pytest.approx(found, rel=1e-4)
    assert before[0] == graph_module.code
    assert all(torch.equal(value, before[1][name]) for name, value in graph_module.state_dict().items())


def test_relevance_finds_the_garment() -> None:
    """More relevance, for its area, where the image is not background."""
    sample = embedded.calibration_images(32)
    found = Relevance(traced(embedded.load_model(), sample)).of(sample)["patch_embed.proj"].sum(1)
    garment = nn.functional.avg_pool2d(sample, 4)[:, 0] > sample.min() + 0.2
    inside, outside = found[garment].abs().mean(), found[~garment].abs().mean()
    assert inside > 1.5 * outside


def test_errors_say_what_is_wrong() -> None:
    sample = images(2, 4)
    with pytest.raises(CalibrationError, match="class scores"):
        Relevance(traced(nn.Sequential(nn.Conv2d(3, 3, 1)), sample)).of(sample)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    with pytest.raises(SensitivityError, match=r"sums to 0\.0"):
        Relevance(traced(model, sample)).importance([sample])


def test_the_rewritten_graph_prints_its_rules() -> None:
    code = rewritten(built("vit")[0]).code
    assert code.count("relevance_blocks") == 2 * (2 + 1)  # two norms and a GELU in either block
    assert code.count("relevance_matmul") == 2 * 2
