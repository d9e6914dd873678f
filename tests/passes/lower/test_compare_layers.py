"""Faults of a lowering that are small beside what codes at an edge do to the scores: found, and named by layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import fxquant
from fxquant.errors import BackendError
from fxquant.graph.facts import QUANTIZED
from fxquant.runtime.integer.chain import IntegerChain
from fxquant.runtime.known_answers import KnownAnswers
from fxquant.runtime.native import library
from passes.lower.compare_layers import first_difference
from passes.lower.lower import Lower
from passes.lower.prove_lowering import EXACT
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import best
from tests import lowering
from tests.models import ARCHITECTURES, images, vit

pytestmark = pytest.mark.skipif(library.why_absent() is not None, reason=str(library.why_absent()))


@pytest.fixture(scope="module")
def quantized() -> fxquant.Compiled:
    """At 3 bits, not to be changed."""
    return fxquant.compile(vit(), None, calibration=images(2), recipe=best("W3A3", bits=(3,)))


@pytest.fixture
def loose(quantized: fxquant.Compiled) -> KnownAnswers:
    """Its answers, with all the room that answers can have."""
    assert quantized.answers is not None
    return replace(quantized.answers, rounding=0.35)


class WrongBias(Lower):
    """One layer adds a little too much."""

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        layer: Any = graph_module.get_submodule("blocks.0.mlp.fc2")
        layer.bias = layer.bias + 0.1 * torch.linspace(-1, 1, len(layer.bias))
        return super().apply(graph_module, context)


class WrongScores(Lower):
    """One attention has scores that are too large by a fifth."""

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        layer: Any = graph_module.get_submodule("blocks.0.attn.qk")
        layer.left_quantizer.scale *= 1.2
        return super().apply(graph_module, context)


@pytest.mark.parametrize(
    ("lower", "layer"),
    [
        (WrongBias(), r"is 'blocks\.0\.mlp\.fc2'"),
        (WrongScores(), r"is before 'blocks\.0\.attn\.proj', one of blocks\.0\.attn\.qkv"),
    ],
)
def test_a_small_fault_is_found_in_its_layer(
    quantized: fxquant.Compiled, loose: KnownAnswers, lower: Lower, layer: str
) -> None:
    pipeline = Pipeline([lower], assumes=[QUANTIZED])
    with pytest.raises(BackendError, match=rf"computes something else: the first layer that differs {layer}"):
        pipeline.run(quantized.graph_module, PassContext(answers=loose))


@pytest.mark.parametrize("architecture", ["swin", "swin that pads"])
def test_a_residual_that_is_added_in_the_order_of_windows_is_no_difference(architecture: str) -> None:
    graph_module, x = lowering.quantized(architecture), images(2, ARCHITECTURES[architecture]()[1])
    problem, _ = first_difference(graph_module, Lower("cpu-native", chains=False), x)
    assert problem == ""


def test_a_fault_of_chains_alone_is_found(
    quantized: fxquant.Compiled, loose: KnownAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = IntegerChain.forward

    def wrong(self: IntegerChain, x: Tensor) -> Tensor:
        found = plain(self, x)
        return found * torch.linspace(0.97, 1.03, found.shape[-1]) if found.is_floating_point() else found

    monkeypatch.setattr(IntegerChain, "forward", wrong)
    with pytest.raises(BackendError, match="its layers, each run on its own, give something else than chains"):
        Pipeline([Lower()], assumes=[QUANTIZED]).run(quantized.graph_module, PassContext(answers=loose))


@pytest.mark.parametrize("seed", range(3))
def test_codes_that_fall_the_other_way_at_an_edge_are_no_fault(quantized: fxquant.Compiled, seed: int) -> None:
    """Answers that are off by more than rounding, as those of another machine may be: every layer is compared."""
    assert quantized.answers is not None
    noise = torch.randn(quantized.answers.simulated.shape, generator=torch.Generator().manual_seed(seed))
    spread = quantized.answers.simulated.std()
    off = replace(quantized.answers, simulated=quantized.answers.simulated + 0.01 * spread * noise, rounding=0.35)
    context = PassContext(answers=off)
    Pipeline([Lower()], assumes=[QUANTIZED]).run(quantized.graph_module, context)
    assert context.journal.entries[-1].notes["proof"]["difference"] > EXACT
