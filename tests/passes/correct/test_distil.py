"""Distil on blocks of the embedded model: closer to the float model on unseen images, on the grid, resumable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from allocators.uniform import Uniform
from fxquant.artefact.cache import Cache
from fxquant.data import embedded
from fxquant.errors import CalibrationError
from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import facts_of
from fxquant.graph.notes import execution_of
from fxquant.quantizers.learned import LearnedCodes
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.simulated import QuantizedWeightModule
from fxquant.sensitivity.divergence import kl_divergence
from passes.allocate.allocate_bits import AllocateBits
from passes.correct.block_error import token_errors
from passes.correct.block_pairs import BlockPairs
from passes.correct.distil import Distil
from passes.correct.held_out import HeldOut, held_out
from passes.correct.training import NOMINAL_BITS, Training, mean_bits
from passes.lower.lower import Lower
from passes.pipeline.contract import PassContext
from passes.pipeline.journal import Journal
from passes.pipeline.pipeline import Pipeline
from passes.recipes import mptq_vit, recipe
from passes.search.augment import Augment
from passes.substitute.substitute_quantizers import SubstituteQuantizers
from tests.models import embedded_blocks, images, vit

IMAGES = embedded.calibration_images(96)
CONTEXT = PassContext(IMAGES[:64], batch_size=16)
UNSEEN = IMAGES[64:]
SMALL = PassContext(images(16), batch_size=16)
QUICK = Distil(
    steps=34,
    images=8,
    weight_rate=0.004,
    scale_rate=2e-3,
    rest_rate=2.5e-4,
    features=1.0,
    augment=Augment(0.8, 0.0, 0.0),
    checks=2,
    closed_form=None,
)


def model() -> nn.Module:
    """Real weights, and as few blocks as still tell classes apart."""
    return embedded_blocks(4)


@pytest.fixture(scope="module")
def allocated() -> GraphModule:
    pipeline = mptq_vit("W2A3", allocator=Uniform())
    before = pipeline[: pipeline.position(AllocateBits) + 1]
    return before.run(trace(model(), IMAGES[:2]), CONTEXT)


@pytest.fixture(scope="module")
def small() -> GraphModule:
    """One block of random weights: for what holds of any model."""
    pipeline = mptq_vit("W2A3", allocator=Uniform(), bits=(2, 3, 8))
    before = pipeline[: pipeline.position(AllocateBits) + 1]
    return before.run(trace(vit(depth=1), images(2)), SMALL)


@pytest.fixture(scope="module")
def distilled(allocated: GraphModule) -> GraphModule:
    return run(allocated, QUICK)


def run(graph_module: GraphModule, step: Distil, context: PassContext = CONTEXT) -> GraphModule:
    return Pipeline([step], facts_of(graph_module)).run(graph_module, context)


def quantized(graph_module: GraphModule) -> GraphModule:
    return Pipeline([SubstituteQuantizers()], facts_of(graph_module)).run(graph_module, PassContext())


def unseen_divergence(graph_module: GraphModule) -> float:
    with torch.no_grad():
        return float(divergence(model()(UNSEEN), quantized(graph_module)(UNSEEN)))


def everything(graph_module: GraphModule) -> dict[str, Tensor]:
    return quantized(graph_module).state_dict()


def test_closer_to_the_float_model_on_unseen_images(allocated: GraphModule, distilled: GraphModule) -> None:
    assert unseen_divergence(distilled) < 0.7 * unseen_divergence(allocated)


def test_the_given_graph_is_not_changed(small: GraphModule) -> None:
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    run(small, replace(QUICK, steps=1, checks=1), SMALL)
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())


def test_all_kinds_of_numbers_learn(allocated: GraphModule, distilled: GraphModule) -> None:
    before, after = everything(allocated), everything(distilled)
    for kind in ("weight_codes", "weight_quantizer.scale", "input_quantizer.scale", ".bias", "norm1.weight"):
        names = [name for name in before if kind in name]
        assert any(not torch.equal(before[name], after[name]) for name in names), kind


def test_weights_lie_on_their_grid(distilled: GraphModule) -> None:
    graph_module = quantized(distilled)
    checked = 0
    for node in nodes_with_role(distilled):
        module = graph_module.get_submodule(annotation_of(node).layer)
        if isinstance(module, QuantizedWeightModule):
            torch.testing.assert_close(module.weight, distilled.get_submodule(str(node.target)).weight)
            checked += 1
    assert checked == 18


def test_runs_as_integers(distilled: GraphModule) -> None:
    simulated = quantized(distilled)
    lowered = Pipeline([Lower("auto")], facts_of(simulated)).run(simulated, CONTEXT)
    reference = quantized(distilled)(UNSEEN)
    assert float(divergence(reference, lowered(UNSEEN))) < 0.02
    if kernels := set(execution_of(lowered).values()):
        assert "simulated" not in kernels


def test_same_seed_same_result_and_another_seed_another(small: GraphModule) -> None:
    step = replace(QUICK, steps=8, checks=1, scale_rate=0.01)
    first, second = (everything(run(small, step, SMALL)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = everything(run(small, step, replace(SMALL, seed=1)))
    assert any(not torch.equal(first[name], other[name]) for name in first)


class Stops(Cache):
    """Interrupts after the first check."""

    def write(self, *content, **options):  # type: ignore[no-untyped-def]
        super().write(*content, **options)
        raise KeyboardInterrupt


def test_micro_batches_add_up_to_the_batch(small: GraphModule) -> None:
    """Of three images, two and one, each by its share; Adam's first step shows the sign of every gradient."""
    step = replace(QUICK, steps=1, checks=1, images=3, scale_rate=0.0, features=40.0)
    whole, cut = (in_training(small, replace(step, micro_batches=count)) for count in (1, 2))
    for training in (whole, cut):
        training.advance()
    for name, one in whole.rest.items():
        assert float(torch.isclose(one, cut.rest[name]).float().mean()) > 0.98, name


def test_resumes_at_the_check_where_it_stopped(small: GraphModule, tmp_path: Path) -> None:
    step = replace(QUICK, steps=8, scale_rate=0.01)
    whole = everything(run(small, step, SMALL))
    with pytest.raises(KeyboardInterrupt):
        run(small, step, replace(SMALL, cache=Stops(tmp_path)))
    resumed = everything(run(small, step, replace(SMALL, cache=Cache(tmp_path))))
    assert len(list(tmp_path.iterdir())) == 1, "only the last check is kept"
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    journal = Journal()
    again = run(small, step, replace(SMALL, cache=Cache(tmp_path), journal=journal))
    assert all(torch.equal(whole[name], tensor) for name, tensor in everything(again).items())
    assert len(journal.entries[-1].notes["divergences"]) == 3


def test_never_worse_on_held_out_images(allocated: GraphModule) -> None:
    """Rates that destroy everything: the start is what stays."""
    journal = Journal()
    step = replace(QUICK, steps=2, weight_rate=50.0, scale_rate=5.0, augment=Augment(0.8))
    result = run(allocated, step, replace(CONTEXT, journal=journal))
    assert journal.entries[-1].notes["kept_check"] == 0
    assert all(torch.equal(a, b) for a, b in zip(*(everything(g).values() for g in (allocated, result)), strict=True))


def test_where_training_does_not_pay_it_ends_after_two_checks(allocated: GraphModule) -> None:
    journal = Journal()
    step = replace(QUICK, steps=5, checks=5, weight_rate=50.0, scale_rate=5.0)
    run(allocated, step, replace(CONTEXT, journal=journal))
    assert len(journal.entries[-1].notes["divergences"]) == 3, "the start, and two checks"


def test_training_that_does_not_pay_leaves_what_best_gives() -> None:
    """Of the same images: the start is the rounding of `best`, with its balanced heads and its scales."""
    options = {"bits": (3, 8), "allocator": Uniform()}
    graph_module, found = trace(vit(depth=1), images(2)), {}
    for name in ("best", "best_thorough"):
        pipeline = recipe(name)("W3A3", **options)
        if name == "best_thorough":
            destructive = {"weight_rate": 50.0, "scale_rate": 5.0, "rest_rate": 5.0, "closed_form": None}
            pipeline = pipeline.changed(Distil, steps=1, checks=1, **destructive)
        found[name] = pipeline.run(graph_module, SMALL)
    mine, theirs = (found[name].state_dict() for name in ("best_thorough", "best"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def test_rates_beyond_all_measure_leave_the_start(allocated: GraphModule) -> None:
    journal = Journal()
    step = replace(QUICK, weight_rate=1e30, scale_rate=1e30, rest_rate=1e30, steps=4)
    found = run(allocated, step, replace(CONTEXT, journal=journal))
    notes = journal.entries[-1].notes
    assert notes["divergences"][1:] == [None, None]
    assert notes["kept_check"] == 0
    start = run(allocated, replace(QUICK, weight_rate=1e-12, scale_rate=1e-12, rest_rate=1e-12, steps=4))
    torch.testing.assert_close(found(UNSEEN[:4]), start(UNSEEN[:4]), atol=1e-4, rtol=1e-4)


def divergence(wanted_bc: Tensor, found_bc: Tensor) -> Tensor:
    return kl_divergence(wanted_bc, found_bc) / len(wanted_bc)


def test_losses_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * (0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75)))
    torch.testing.assert_close(divergence(p.log() + 3, q.log()), expected)
    wanted = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    torch.testing.assert_close(token_errors(wanted, wanted + torch.tensor([1.0, 0.0])), torch.tensor((1 / 25 + 1) / 2))


def test_held_out_images_are_not_trained_on() -> None:
    train, held = held_out(17)
    assert sorted(train.tolist() + held.tolist()) == list(range(17))
    assert held.tolist() == [7, 15]
    assert [indices.tolist() for indices in held_out(2)] == [[0, 1], [0, 1]]


def test_options_that_make_no_sense() -> None:
    with pytest.raises(CalibrationError, match="at least 1"):
        Distil(steps=0)
    with pytest.raises(CalibrationError, match="micro_batches must be 1 or a power of two"):
        Distil(micro_batches=3)


def test_mean_bits_count_every_weight() -> None:
    """192 weights of 3 bits and 64 of 5 have 3.5; rates are scaled by 2 to the power of 3 less that."""
    weights = [
        LearnedCodes(torch.randn(8, n), UniformQuantizer(bits, torch.ones(8, 1))) for n, bits in ((24, 3), (8, 5))
    ]
    assert mean_bits(weights) == 3.5
    assert mean_bits([]) == NOMINAL_BITS


def test_steps_and_rates_fall_with_the_bits(small: GraphModule) -> None:
    """Weights of 2 bits learn at twice the rates given and for half as many steps again: those hold for 3."""
    training = in_training(small)
    assert training.steps == 1.5 * QUICK.steps
    assert training.rates == [2 * rate for rate in (QUICK.weight_rate, QUICK.scale_rate, QUICK.rest_rate)]


def in_training(graph_module: GraphModule, step: Distil = QUICK) -> Training:
    pairs = BlockPairs(graph_module, SMALL)
    train, held = held_out(16)
    return Training(step, pairs, {}, train, HeldOut(pairs, held, step.images))


@pytest.mark.parametrize("mean_is_better", [True, False])
def test_the_better_of_what_is_there_and_its_running_mean_is_kept(
    small: GraphModule, mean_is_better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = in_training(small)
    found = iter([0.5, 0.4] if mean_is_better else [0.4, 0.5])
    monkeypatch.setattr(HeldOut, "divergence", lambda *_, **__: next(found))
    training.divergences = [1.0]
    start = training.state()
    training.advance()
    state = training.state()
    assert training.divergences == pytest.approx([1.0, 0.4])
    count = len(training.best)
    now, best, mean = ([state[f"{name}.{index}"] for index in range(count)] for name in ("now", "best", "mean"))
    for kept, averaged, value in zip(best, mean, now, strict=True):
        assert torch.equal(kept, averaged if mean_is_better else value)
    moved = [not torch.equal(start[f"now.{index}"], now[index]) for index in range(count)]
    lags = [not torch.equal(a, b) for a, b in zip(mean, now, strict=True)]
    assert any(moved)
    assert lags == moved
