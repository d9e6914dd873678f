"""Reconstruct and CorrectWeights on blocks of the embedded model: better on unseen images, on the grid, resumable."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from allocators.uniform import Uniform
from fxquant.artefact.cache import Cache
from fxquant.data import embedded
from fxquant.errors import CalibrationError
from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import facts_of
from fxquant.runtime.simulated import QuantizedWeightModule
from passes.allocate.allocate_bits import AllocateBits
from passes.correct.block_pairs import BlockPairs
from passes.correct.correct_weights import CorrectWeights, Moments, token_weights
from passes.correct.reconstruct import Reconstruct
from passes.pipeline.contract import Pass, PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import mptq_vit
from passes.substitute.substitute_quantizers import SubstituteQuantizers, chosen
from tests.models import embedded_blocks, images, vit

IMAGES = embedded.calibration_images(40)
CONTEXT = PassContext(IMAGES[:24], batch_size=12)
UNSEEN = IMAGES[24:]
SMALL = PassContext(images(8), batch_size=4)
QUICK = Reconstruct(steps=6, images=4, checks=3)


@pytest.fixture(scope="module")
def allocated() -> GraphModule:
    pipeline = mptq_vit("W3A4", allocator=Uniform(), weight_scales="channel")
    before = pipeline[: pipeline.position(AllocateBits) + 1]
    return before.run(trace(embedded_blocks(3), IMAGES[:2]), CONTEXT)


@pytest.fixture(scope="module")
def small() -> GraphModule:
    """One block of random weights: for what holds of any model."""
    pipeline = mptq_vit("W3A4", allocator=Uniform(), bits=(2, 3, 4, 8))
    before = pipeline[: pipeline.position(AllocateBits) + 1]
    return before.run(trace(vit(depth=1), images(2)), SMALL)


def rewritten(graph_module: GraphModule, step: Pass, context: PassContext = CONTEXT) -> GraphModule:
    return Pipeline([step], facts_of(graph_module)).run(graph_module, context)


def errors(graph_module: GraphModule, reference: GraphModule) -> list[float]:
    """Squared error of every block's output on unseen images, relative to the float network's power."""
    target = BlockPairs(reference, PassContext(UNSEEN, 16))
    found = BlockPairs(graph_module, PassContext(UNSEEN, 16))
    pairs = zip(target, found, strict=True)
    result = []
    for wanted, got in pairs:
        output = found.run(got.quantized, got.quantized_input)
        result.append(float((output - wanted.target).square().mean() / wanted.target.square().mean()))
    return result


def weights(graph_module: GraphModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}


def scales(graph_module: GraphModule) -> list[float]:
    return [
        float(candidate.quantizer.scale.sum())
        for node in nodes_with_role(graph_module)
        for operand in annotation_of(node).inputs
        if (candidate := chosen(operand, "")) is not None
    ]


@pytest.mark.parametrize(
    "step",
    [
        CorrectWeights(),
        CorrectWeights(rounding="nearest"),
        QUICK,
        replace(QUICK, loss="fisher", rank=2),
        replace(QUICK, steps=30, closed_form=None, rounding_rate=0.03),
    ],
    ids=["closed form", "ridge only", "reconstruct", "fisher", "adaround"],
)
def test_better_than_nearest_on_unseen_images(allocated: GraphModule, step: Pass) -> None:
    before = weights(allocated)
    result = rewritten(allocated, step)
    nearest, learned = errors(allocated, allocated), errors(result, allocated)
    assert sum(learned[1:-1]) < 0.97 * sum(nearest[1:-1])
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(allocated).items()), (
        "given graph unchanged"
    )


@pytest.mark.parametrize("step", [CorrectWeights(), replace(QUICK, rounding_rate=0.01)], ids=["closed form", "learned"])
def test_substitution_finds_exactly_what_was_learned(small: GraphModule, step: Pass) -> None:
    result = rewritten(small, step, SMALL)
    quantized = rewritten(result, SubstituteQuantizers(), SMALL)
    checked = 0
    for node in nodes_with_role(result):
        module = quantized.get_submodule(annotation_of(node).layer)
        if isinstance(module, QuantizedWeightModule):
            torch.testing.assert_close(module.weight, result.get_submodule(str(node.target)).weight)
            checked += 1
    assert checked == 6


def test_scales_are_learned_and_only_at_the_allocated_width(allocated: GraphModule) -> None:
    result = rewritten(allocated, replace(QUICK, steps=12, checks=6))
    moved = [a != b for a, b in zip(scales(allocated), scales(result), strict=True)]
    assert sum(moved) > len(moved) // 2
    for before, after in zip(nodes_with_role(allocated), nodes_with_role(result), strict=True):
        for was, operand in zip(annotation_of(before).inputs, annotation_of(after).inputs, strict=True):
            for old, new in zip(was.candidates, operand.candidates, strict=True):
                assert old.bits == was.bits or torch.equal(old.quantizer.scale, new.quantizer.scale)


def test_same_seed_same_result_and_another_seed_another(small: GraphModule) -> None:
    step = replace(QUICK, steps=2, closed_form=None)
    first, second = (scales(rewritten(small, step, SMALL)) for _ in range(2))
    assert first == second
    assert first != scales(rewritten(small, step, replace(SMALL, seed=1)))


class Stops(Cache):
    """Fails when a third block is to be learned."""

    made = 0

    def recall_tensors(self, key, make):  # type: ignore[no-untyped-def]
        def counted() -> dict[str, Tensor]:
            self.made += 1
            if self.made > 2:
                raise KeyboardInterrupt
            return make()

        return super().recall_tensors(key, counted)


class Counts(Stops):
    made = -100


def test_resumes_at_the_block_where_it_stopped(small: GraphModule, tmp_path: Path) -> None:
    step = replace(QUICK, steps=2, closed_form=None, checks=1)
    whole = rewritten(small, step, SMALL)
    with pytest.raises(KeyboardInterrupt):
        rewritten(small, step, replace(SMALL, cache=Stops(tmp_path)))
    assert len(list(tmp_path.iterdir())) == 2
    cache = Counts(tmp_path)
    resumed = rewritten(small, step, replace(SMALL, cache=cache))
    assert cache.made == -100 + 1
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in resumed.state_dict().items())
    assert scales(whole) == scales(resumed)
    other = Counts(tmp_path)
    rewritten(small, replace(step, steps=1), replace(SMALL, cache=other))
    assert other.made == -100 + 3, "other options, other results"


def test_never_worse_on_held_out_images(small: GraphModule) -> None:
    """A rate that destroys everything: the start is what stays."""
    context = replace(SMALL, journal=copy.deepcopy(SMALL.journal))
    rewritten(small, replace(QUICK, closed_form=None, rounding_rate=5.0, scale_rate=3.0), context)
    blocks = context.journal.entries[-1].notes["blocks"]
    assert [block["block"] for block in blocks][:2] == ["patch_embed", "block 0"]
    assert all(block["after"] <= block["before"] for block in blocks)


class TestClosedForm:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator)
    missing = torch.randn(300, 3, generator=generator) + 2

    def moments(self) -> Moments:
        found = Moments.empty(3, torch.zeros(3, 5))
        for image, (x, missing) in enumerate(zip(self.x.split(50), self.missing.split(50), strict=True)):
            found.add(image % 3, x.double(), missing.double(), None)
        return found

    def test_solves_the_ridge_regression(self) -> None:
        found = self.moments()
        x = torch.cat([self.x, torch.ones(300, 1)], 1).double()
        penalty = torch.full((6,), 0.5 * float(self.x.double().square().sum() / 5), dtype=torch.float64)
        penalty[-1] = 0.3
        expected = torch.linalg.solve(x.T @ x + torch.diag(penalty), x.T @ self.missing.double()).T
        torch.testing.assert_close(found.solve(0.5), expected, rtol=1e-6, atol=1e-9)

    def test_a_fold_left_out_is_not_seen(self) -> None:
        found, other = self.moments(), self.moments()
        other.inputs[1] *= 7
        other.missing[1] += 3
        torch.testing.assert_close(found.solve(0.1, without=1), other.solve(0.1, without=1), rtol=1e-6, atol=1e-9)

    def test_error_and_bias_by_hand(self) -> None:
        found, change = self.moments(), torch.randn(3, 6, generator=self.generator).double()
        x = torch.cat([self.x, torch.ones(300, 1)], 1).double()
        left = (self.missing.double() - x @ change.T).square().sum(1)
        expected = left.reshape(6, 50)[[0, 3]].sum()
        assert found.error(change, 0) == pytest.approx(float(expected))
        bias = (self.missing.double() - self.x.double() @ change[:, :-1].T).mean(0)
        torch.testing.assert_close(found.mean_missing(change[:, :-1]), bias, rtol=1e-5, atol=1e-5)

    def test_massive_tokens_count_no_more_than_others(self) -> None:
        x = torch.ones(9, 4)
        x[2] *= 100
        assert torch.allclose(token_weights(x) * x.square().sum(1), torch.full((9,), 4.0))


def test_options_that_make_no_sense() -> None:
    with pytest.raises(CalibrationError, match="folds must be at least 2"):
        CorrectWeights(folds=1)
    with pytest.raises(CalibrationError, match="drop from 0 to 1"):
        Reconstruct(drop=1.5)
