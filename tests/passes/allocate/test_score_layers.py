"""ScoreLayers and its metrics on a small Vision Transformer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from fxquant.artefact.cache import Cache
from fxquant.errors import PipelineError, SensitivityError, VerificationError
from fxquant.graph.annotation import Annotation, Role, annotate_operands, annotation_of, nodes_with_role
from fxquant.graph.facts import TRACED, declare, verify
from fxquant.sensitivity.measured import Divergence
from passes.allocate.allocate_bits import COST_TABLE, AllocateBits
from passes.allocate.metrics import FisherTrace, NoiseRatio, NuclearNorm, PredictedLoss, TypeAwareFisher
from passes.allocate.score_layers import LAMPQ_ROLES, SCORED, Metric, ScoreLayers, Scores
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import mptq_vit
from passes.search.search_scales import SearchScales
from tests.models import images, traced, vit
from tests.operands import input_candidates, weight_candidates

BITS = (2, 3, 4, 8)
CONTEXT = PassContext(images(4), batch_size=2)


@pytest.fixture(scope="module")
def searched() -> GraphModule:
    """Copy before use."""
    pipeline = mptq_vit("W4A4", bits=BITS)
    return pipeline[: pipeline.position(AllocateBits)].run(traced(vit(depth=3), images(2)), CONTEXT)


def scored(searched: GraphModule, metric: Metric, **options: Any) -> tuple[dict[str, Annotation], dict[str, Any]]:
    graph_module, context = copy.deepcopy(searched), PassContext(images(4), batch_size=2)
    step = ScoreLayers(metric, **options)
    Pipeline([step], [TRACED, *step.requires]).run(graph_module, context)
    result = Pipeline([step], [TRACED, *step.requires]).run(graph_module, context)
    found = {annotation_of(n).layer: annotation_of(n) for n in nodes_with_role(result)}
    return found, context.journal.entries[-1].notes


def total(annotation: Annotation) -> list[float]:
    return [sum(scores) for scores in zip(*(operand.scores for operand in annotation.operands), strict=True)]


def test_fisher_falls_by_gamma_and_only_the_four_layers_are_scored(searched: GraphModule) -> None:
    layers, notes = scored(searched, FisherTrace(gamma=3.0))
    assert len(notes["fisher_trace"]) == notes["scored"] == 12
    for layer, annotation in layers.items():
        if annotation.role in LAMPQ_ROLES:
            trace = notes["fisher_trace"][layer]
            assert total(annotation) == pytest.approx([trace * 3.0**-b for b in BITS], rel=1e-12)
        else:
            assert not any(operand.scores for operand in annotation.operands)
    everywhere, _ = scored(searched, FisherTrace(), roles=None)
    assert everywhere["head"].operands[0].scores
    assert everywhere["patch_embed.proj"].operands[0].scores


def test_type_aware_scores_average_to_the_measured_drops(searched: GraphModule) -> None:
    """With every layer sampled, the mean score of a type at beta bits is its mean drop."""
    layers, notes = scored(searched, TypeAwareFisher(mu=3, beta=3, traces_of="float"))
    assert len(notes["drop"]) == 12
    for role in LAMPQ_ROLES:
        mine = [layer for layer, annotation in layers.items() if annotation.role is role]
        mean_drop = sum(notes["drop"][layer] for layer in mine) / 3
        mean_score = sum(total(layers[layer])[BITS.index(3)] for layer in mine) / 3
        assert mean_score == pytest.approx(mean_drop, rel=1e-9)
        assert mean_drop > 0
    plain, _ = scored(searched, FisherTrace())
    ratios = {layer: total(layers[layer])[0] / total(plain[layer])[0] for layer in notes["fisher_trace"]}
    assert ratios["blocks.0.mlp.fc1"] == pytest.approx(ratios["blocks.2.mlp.fc1"])
    assert ratios["blocks.0.mlp.fc1"] != pytest.approx(ratios["blocks.0.mlp.fc2"], rel=1e-3)


def test_alpha_divides_by_the_traces_of_quantized_layers(searched: GraphModule) -> None:
    """Against each image's gradient of the cross-entropy, weight and input of the layer at 3 bits (Algorithm 1)."""
    labels, x = (0, 1, 2, 3), images(4)
    _, notes = scored(searched, TypeAwareFisher(mu=1, beta=3, labels=labels))
    drops, traces = notes["drop"], notes["quantized_trace"]
    assert set(traces) == set(drops)
    roles = {annotation_of(n).layer: str(annotation_of(n).role) for n in nodes_with_role(searched)}
    for layer, trace in traces.items():
        (node,) = (n for n in nodes_with_role(searched, *LAMPQ_ROLES) if annotation_of(n).layer == layer)
        at_three = [
            next(c.quantizer for c in operand.candidates if c.bits == 3) for operand in annotation_of(node).operands
        ]
        alone = copy.deepcopy(searched)
        module = alone.get_submodule(str(node.target))
        module.weight.data = at_three[0](module.weight.data.flatten(1)).reshape(module.weight.shape)
        module.weight.requires_grad_()
        module.register_forward_pre_hook(lambda _, inputs, quantizer=at_three[1]: (quantizer(inputs[0].detach()),))
        squares = []
        for index, label in enumerate(labels):
            loss = torch.nn.functional.cross_entropy(alone(x[index : index + 1]), torch.tensor([label]))
            squares.append(float(torch.autograd.grad(loss, module.weight)[0].square().sum()))
        assert trace == pytest.approx(sum(squares) / 4, rel=1e-3)
        assert notes["alpha"][roles[layer]] == pytest.approx(drops[layer] / trace)
    assert traces != {layer: notes["fisher_trace"][layer] for layer in traces}


@pytest.mark.parametrize("beta", [1, 0, 9])
def test_a_width_that_no_layer_can_have_is_refused(beta: int) -> None:
    with pytest.raises(SensitivityError, match="width from 2 to 8"):
        TypeAwareFisher(beta=beta)


@pytest.mark.parametrize(("beta", "nearest"), [(5, 4), (7, 8), (3, 3)])
def test_layers_are_sampled_at_the_candidate_width_nearest_to_beta(
    searched: GraphModule, beta: int, nearest: int
) -> None:
    layers, notes = scored(searched, TypeAwareFisher(mu=1, beta=beta))
    expected, exact = scored(searched, TypeAwareFisher(mu=1, beta=nearest))
    assert (notes["beta"], notes["drop"]) == (nearest, exact["drop"])
    assert total(layers["blocks.0.mlp.fc1"]) == total(expected["blocks.0.mlp.fc1"])


def test_the_same_blocks_are_sampled_for_every_type_and_follow_the_seed(searched: GraphModule) -> None:
    metric = TypeAwareFisher(mu=1)
    nodes = nodes_with_role(searched, *LAMPQ_ROLES)
    drawn = [metric.drops(searched, nodes, replace(CONTEXT, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    blocks = [{layer.split(".")[1] for layer in found} for found in drawn]
    assert drawn[0] == drawn[1]
    assert all(len(found) == 4 and len(block) == 1 for found, block in zip(drawn, blocks, strict=True))
    assert len(set.union(*blocks)) > 1


def test_other_drops_are_shares_of_images(searched: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images; the third changes its prediction from right to wrong, the fourth from wrong to right."""
    exact = torch.tensor([[3.0, 0.0], [0.0, 3.0], [1.0, 0.0], [1.0, 0.0]]).log_softmax(1)
    moved = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]).log_softmax(1)
    monkeypatch.setattr(Divergence, "outputs", lambda _, bits: (moved if bits else exact,))
    nodes = nodes_with_role(searched, *LAMPQ_ROLES)

    def drop(**options: Any) -> float:
        (found,) = set(
            TypeAwareFisher(mu=1, **options).drops(searched, nodes, replace(CONTEXT, cache=Cache())).values()
        )
        return found

    assert drop(drop="disagreement") == 0.5
    assert drop(drop="accuracy", labels=(0, 1, 0, 1)) == 0.0
    assert drop(drop="accuracy", labels=(0, 1, 0, 0)) == 0.5
    with pytest.raises(SensitivityError, match="1 labels for 4 images"):
        drop(drop="accuracy", labels=(0,))
    expected = (exact.exp() * (exact - moved)).sum(1).mean()
    assert drop() == pytest.approx(float(expected))


def test_labels_make_the_empirical_fisher(searched: GraphModule) -> None:
    with_labels, _ = scored(searched, FisherTrace(labels=(0, 1, 2, 3)))
    without, _ = scored(searched, FisherTrace())
    assert with_labels["blocks.0.attn.qkv"].operands[0].scores != without["blocks.0.attn.qkv"].operands[0].scores


def test_nuclear_norm_weighs_the_weights_noise(searched: GraphModule) -> None:
    layers, notes = scored(searched, NuclearNorm())
    norms = notes["nuclear_norm"]
    assert norms["blocks.1.attn.qkv"] == norms["blocks.1.attn.proj"] != norms["blocks.1.mlp.fc1"]
    for layer, norm in norms.items():
        noise = [candidate.noise for candidate in weight_candidates(layers[layer])]
        assert total(layers[layer]) == pytest.approx([norm * n for n in noise])


def test_noise_ratio_and_predicted_loss_come_from_the_candidates(searched: GraphModule) -> None:
    layers, _ = scored(searched, NoiseRatio(), roles=None)
    fc1, qk = layers["blocks.0.mlp.fc1"], layers["blocks.0.attn.qk"]
    assert fc1.operands[0].scores[2] == weight_candidates(fc1)[2].noise_ratio
    left, right = (group[1].noise_ratio for group in input_candidates(qk))
    assert total(qk)[1] == pytest.approx((left + right) / 2)
    layers, _ = scored(searched, PredictedLoss(), roles=None)
    assert layers["head"].operands[0].scores == tuple(c.loss for c in weight_candidates(layers["head"]))
    graph_module = copy.deepcopy(searched)
    allocate = AllocateBits(mptq_vit("W4A4")[-2].budget)  # type: ignore[attr-defined]
    allocate.apply(graph_module, CONTEXT)
    plain = COST_TABLE.of(graph_module)
    ScoreLayers(PredictedLoss(), roles=None).apply(graph_module, CONTEXT)
    allocate.apply(graph_module, CONTEXT)
    assert (plain.cost == COST_TABLE.of(graph_module).cost).all()


@dataclass(frozen=True)
class Counting:
    """A metric of someone else's: scores that say how often it was asked."""

    power: float = 1.0
    asked: list[int] = field(default_factory=list, compare=False, repr=False)

    def score(self, graph_module: GraphModule, nodes: Any, context: PassContext) -> Scores:
        self.asked.append(len(nodes))
        return Scores.shared({annotation_of(n).layer: [b**-self.power for b in BITS] for n in nodes}, {"own": 1})


def test_scores_are_kept_until_what_they_depend_on_changes(searched: GraphModule, tmp_path: Path) -> None:
    metric = Counting()

    def run(context: PassContext, graph_module: GraphModule = searched, step: ScoreLayers | None = None) -> int:
        (step or ScoreLayers(metric)).apply(copy.deepcopy(graph_module), replace(context, cache=Cache(tmp_path)))
        return len(metric.asked)

    assert [run(CONTEXT), run(CONTEXT)] == [1, 1]
    assert run(CONTEXT, step=ScoreLayers(replace(metric, power=2.0))) == 2
    assert run(CONTEXT, step=ScoreLayers(metric, roles=(Role.FC1,))) == 3
    assert run(replace(CONTEXT, images_bchw=images(3))) == 4
    assert run(replace(CONTEXT, seed=1)) == 5
    other = copy.deepcopy(searched)
    (node, *_) = nodes_with_role(other, Role.FC1)
    first, *rest = weight_candidates(annotation_of(node))
    weight, x = annotation_of(node).operands
    annotate_operands(node, candidates=[(replace(first, noise=first.noise * 2), *rest), x.candidates])
    assert run(CONTEXT, other) == 6
    weight = copy.deepcopy(searched)
    with torch.no_grad():
        weight.get_submodule("head").weight.mul_(1.01)
    assert run(CONTEXT, weight) == 7


@pytest.mark.quick
def test_bad_scores_are_refused(searched: GraphModule) -> None:
    @dataclass(frozen=True)
    class Negative:
        def score(self, graph_module: GraphModule, nodes: Any, context: PassContext) -> Scores:
            return Scores.shared({annotation_of(n).layer: [-1.0] * 4 for n in nodes}, {})

    with pytest.raises(SensitivityError, match=r"Negative\(\) gives the operands of blocks.0.attn.qkv"):
        ScoreLayers(Negative()).apply(copy.deepcopy(searched), CONTEXT)
    for bad in (
        lambda: FisherTrace(gamma=1.0),
        lambda: TypeAwareFisher(mu=0),
        lambda: TypeAwareFisher(drop="accuracy"),
    ):
        with pytest.raises(SensitivityError):
            bad()


def test_scores_become_stale_with_new_candidates() -> None:
    with pytest.raises(PipelineError, match="'scales searched'"):
        mptq_vit(4).before(SearchScales, ScoreLayers(FisherTrace()))
    assert SCORED.falls_with(SearchScales().provides)
    assert Scores.shared({"a": [2.0]}, {}).layers == {"a": [[1.0], [1.0]]}


def test_the_verifier_counts_scores(searched: GraphModule) -> None:
    graph_module = copy.deepcopy(searched)
    ScoreLayers(Counting()).apply(graph_module, CONTEXT)
    (node, *_) = nodes_with_role(graph_module, Role.FC1)
    annotate_operands(node, scores=[(1.0,), ()])
    declare(graph_module, frozenset({SCORED}))
    with pytest.raises(VerificationError, match="1 scores for 4 candidates"):
        verify(graph_module, SCORED)
