"""Reconstruction errors against their definition, expected ratios against sampling and the paper's tables."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from fxquant.errors import SensitivityError
from fxquant.graph.annotation import Role, annotation_of, nodes_with_role
from fxquant.sensitivity.nuclear_norm import Module, nuclear_norm, nuclear_norms
from fxquant.sensitivity.reconstruction import expected_ratio, normal_moments, reconstruction_errors
from passes.pipeline.contract import PassContext
from passes.recipes import mptq_vit
from tests.models import images, traced, vit
from tests.operands import input_candidates, weight_candidates

BITS = (2, 4, 8)


@pytest.fixture(scope="module")
def searched() -> GraphModule:
    pipeline = mptq_vit("W4A4", bits=BITS)[:-2]
    return pipeline.run(traced(vit(), images(2)), PassContext(images(4)))


def test_errors_are_their_definition(searched: GraphModule) -> None:
    nodes = nodes_with_role(searched, Role.FC1, Role.FC2)
    pairs = [(2, 2), (4, 4), (4, 8)]
    found = reconstruction_errors(searched, dict.fromkeys(nodes, pairs), images(4).split(3))
    seen: dict[str, torch.Tensor] = {}
    for node in nodes:
        module = searched.get_submodule(str(node.target))
        module.register_forward_hook(lambda _m, inputs, _o, name=str(node.target): seen.update({name: inputs[0]}))
    searched(images(4))
    for node in nodes:
        annotation, x = annotation_of(node), seen[str(node.target)].detach()
        weight = searched.get_submodule(str(node.target)).weight.detach()
        for weight_bits, activation_bits in pairs:
            w = next(c.quantizer for c in weight_candidates(annotation) if c.bits == weight_bits)(weight)
            q = next(c.quantizer for c in input_candidates(annotation)[0] if c.bits == activation_bits)
            exact = x.double() @ weight.double().T
            error = (q(x).double() @ w.double().T - exact).square().sum() / exact.square().sum()
            assert found[node][weight_bits, activation_bits] == pytest.approx(float(error), rel=1e-4)
        assert found[node][2, 2] > found[node][4, 4] > found[node][4, 8]


def test_the_bias_is_no_signal(searched: GraphModule) -> None:
    (node, *_) = nodes_with_role(searched, Role.FC1)
    module = searched.get_submodule(str(node.target))
    before = reconstruction_errors(searched, {node: [(4, 4)]}, [images(4)])[node]
    kept = module.bias.detach().clone()
    with torch.no_grad():
        module.bias.add_(100.0)
        after = reconstruction_errors(searched, {node: [(4, 4)]}, [images(4)])[node]
        module.bias.copy_(kept)
    assert after[4, 4] == pytest.approx(before[4, 4], rel=1e-4)


def test_widths_without_a_candidate_are_refused(searched: GraphModule) -> None:
    (node, *_) = nodes_with_role(searched, Role.FC1)
    with pytest.raises(SensitivityError, match="fc1 has no candidate of 3 bits"):
        reconstruction_errors(searched, {node: [(3, 3)]}, [images(4)])


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_moments_are_those_of_samples(bits: int) -> None:
    x = torch.randn(2_000_000, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    x = x[x.abs() < 3]
    share = len(x) / 2_000_000
    step = 6 / (2**bits - 1)
    d = ((x + 3) / step).round() * step - 3 - x
    cross, square = normal_moments(bits)
    assert cross == pytest.approx(share * float((x * d).mean()), abs=2e-3)
    assert square == pytest.approx(share * float(d.square().mean()), rel=3e-3)


@pytest.mark.parametrize(
    ("bits", "cross", "square"),
    [(1, 1.396, 5.212), (2, 1.655e-2, 3.359e-1), (3, 7.123e-4, 6.109e-2), (6, 1.003e-5, 7.538e-4)],
)
def test_moments_are_the_papers_table_9(bits: int, cross: float, square: float) -> None:
    assert normal_moments(bits) == pytest.approx((cross, square), rel=5e-4)


def test_ratios_where_the_papers_table_2_follows_from_its_table_9() -> None:
    assert [round(expected_ratio(bits), 2) for bits in (4, 5, 8)] == [4.71, 4.29, 4.03]
    assert [round(expected_ratio(bits), 2) for bits in (2, 3, 7)] == [87.45, 6.40, 4.06], "printed: 82.74, 6.59, 4.12"


def test_nuclear_norms_are_those_of_the_features(searched: GraphModule) -> None:
    found = nuclear_norms(searched, images(4).split(3))
    assert set(found) == {(block, module) for block in (0, 1) for module in Module}
    (softmax, *_), (fc2, *_) = nodes_with_role(searched, Role.SOFTMAX), nodes_with_role(searched, Role.FC2)
    features: dict[str, torch.Tensor] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            result = super().run_node(node)
            if node in (softmax, fc2):
                features[node.name] = result.detach().double()
            return result

    Keep(searched).run(images(4))
    for node, module in ((softmax, Module.MSA), (fc2, Module.MLP)):
        x = features[node.name]
        gram = torch.linalg.eigvalsh(x @ x.transpose(-1, -2)).clamp_min(0).sqrt().sum(-1)
        assert found[0, module] == pytest.approx(float(gram.mean()), rel=1e-3)


def test_nuclear_norm_of_known_matrices() -> None:
    assert nuclear_norm(torch.diag(torch.tensor([3.0, -4.0]))[None]).tolist() == [7.0]
