"""Calibrate: statistics of every edge, the same in any batches, with one image's activations at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from fxquant.errors import CalibrationError
from fxquant.graph.annotation import nodes_with_role
from fxquant.quantizers.observers import Observer
from fxquant.quantizers.statistics.histogram import BUCKETS
from fxquant.sensitivity.logit_gradients import logit_gradients
from passes.pipeline import contract
from passes.pipeline.contract import PassContext
from passes.pipeline.gathering import in_shards
from passes.search.calibrate import Calibrate
from passes.search.insert_observers import observers_of
from passes.search.views import Views
from tests.models import VIT, images, timm_model, traced, vit
from tests.operands import plan_and_observe

FULLY = {"softmax_input": "symmetric", "layer_norm_input": "o-2sf"}


@pytest.fixture(scope="module")
def observed() -> GraphModule:
    """One block, fully quantized protocol; copy before use."""
    graph_module = traced(vit(depth=1), images(2))
    plan_and_observe(graph_module, **FULLY)
    return graph_module


def observers(graph_module: GraphModule) -> dict[str, Observer]:
    return {name: m for name, m in graph_module.named_modules() if isinstance(m, Observer)}


def calibrated(graph_module: GraphModule, x: Tensor, **options: Any) -> dict[str, Observer]:
    graph_module = copy.deepcopy(graph_module)
    batch_size, seed = options.pop("batch_size", 8), options.pop("seed", 0)
    Calibrate(**options).apply(graph_module, PassContext(x, batch_size, seed))
    return observers(graph_module)


def assert_same_statistics(first: dict[str, Observer], second: dict[str, Observer], tolerance: float) -> None:
    for name, one in first.items():
        other = second[name]
        assert (one.minimum, one.maximum) == pytest.approx((other.minimum, other.maximum), rel=tolerance, abs=1e-5)
        assert one.images == other.images
        assert one.image_minimum_sum == pytest.approx(other.image_minimum_sum, rel=tolerance, abs=1e-4)
        a, b = one.statistics().moments, other.statistics().moments
        assert a.count == b.count
        assert a.signal == pytest.approx(b.signal, rel=tolerance)
        assert a.weighted == b.weighted
        assert a.moments[3:].sum(1) == pytest.approx(b.moments[3:].sum(1), rel=tolerance, abs=1e-6)
        assert (one.gram is None) == (other.gram is None)
        if one.gram is not None and other.gram is not None:
            grams = one.gram.matrix(), other.gram.matrix()
            assert torch.allclose(*grams, rtol=tolerance, atol=tolerance * float(grams[0].abs().max()))
            weights = one.channel_weight(), other.channel_weight()
            assert (weights[0] is None) == (weights[1] is None)
            if weights[0] is not None and weights[1] is not None:
                assert torch.allclose(*weights, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("fisher", ["signs", "sampled", "arg-max", None])
def test_the_batch_size_has_no_say_in_statistics(observed: GraphModule, fisher: str | None) -> None:
    options = {"fisher": fisher} if fisher else {"gradient": False}
    first, second = (calibrated(observed, images(8), batch_size=size, **options) for size in (3, 8))
    assert_same_statistics(first, second, 0)
    for name, one in first.items():
        assert (one.coherence_sum, one.coherence_count) == (second[name].coherence_sum, second[name].coherence_count)
        assert (one.statistics().moments.moments == second[name].statistics().moments.moments).all()
        if one.gram is not None:
            assert torch.equal(one.gram.matrix(), second[name].gram.matrix())


def test_only_the_first_images_where_asked(observed: GraphModule) -> None:
    x = images(5)
    assert_same_statistics(calibrated(observed, x, images=2), calibrated(observed, x[:2]), 1e-6)


@pytest.mark.parametrize("views", [None, Views(each=2)], ids=["images", "views"])
def test_an_image_added_in_place_gives_the_bits_of_one_that_is_merged(
    observed: GraphModule, monkeypatch: pytest.MonkeyPatch, views: Views | None
) -> None:
    one_by_one = calibrated(observed, images(2), views=views)

    def merged(*settings: Any, in_place: bool, **others: Any) -> Any:
        assert in_place or settings[0] != "calibrating"
        return in_shards(*settings, **others)

    monkeypatch.setattr(contract, "in_shards", merged)
    for name, observer in calibrated(observed, images(2), views=views).items():
        other = one_by_one[name].state()
        assert observer.state().keys() == other.keys()
        assert all(torch.equal(tensor, other[part]) for part, tensor in observer.state().items()), name


def test_without_gradients_views_count_as_images_in_gram_matrices_and_nowhere_else(observed: GraphModule) -> None:
    x, views = images(3), Views(each=1)
    plain = calibrated(observed, x, gradient=False)
    other = calibrated(observed, torch.cat([views.view(x, index, 0) for index in range(3)]), gradient=False)
    both = calibrated(observed, x, gradient=False, views=views)
    assert any(observer.gram is not None for observer in both.values())
    for name, observer in both.items():
        assert (observer.minimum, observer.maximum, observer.images) == (
            plain[name].minimum, plain[name].maximum, len(x)
        )  # fmt: skip
        if observer.families:
            assert (observer.statistics().moments.moments == plain[name].statistics().moments.moments).all()
        if observer.gram is not None:
            mean = (plain[name].gram.matrix() + other[name].gram.matrix()) / 2
            torch.testing.assert_close(observer.gram.matrix(), mean, rtol=1e-4, atol=1e-4 * float(mean.abs().max()))


def test_what_are_no_pictures_has_no_views(observed: GraphModule) -> None:
    graph_module = copy.deepcopy(observed)
    Calibrate(gradient=False, views=Views()).apply(graph_module, PassContext(images(2), pictures=False))
    plain = calibrated(observed, images(2), gradient=False)
    for name, observer in observers(graph_module).items():
        if observer.gram is not None:
            assert torch.equal(observer.gram.matrix(), plain[name].gram.matrix())


@pytest.mark.parametrize("gradient", [True, False])
def test_an_error_on_a_view_names_it(observed: GraphModule, gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Views, "view", lambda self, images_bchw, index, seed: images_bchw[:1] * torch.nan)
    with pytest.raises(CalibrationError, match=r"This was a view.*views=0"):
        calibrated(observed, images(2), gradient=gradient, views=Views())


def test_gradients_of_views_weigh_tokens_and_outputs(observed: GraphModule) -> None:
    found = [calibrated(observed, images(2), outputs=True, views=views) for views in (None, Views(each=3))]
    plain, both = (observers["observer_head_0"] for observers in found)
    assert both.token_weight_sum != plain.token_weight_sum
    assert both.channel_weight().mean() == pytest.approx(1, rel=1e-3), "views count the same for both"
    assert int(both.output_gram.state()["images"]) == 4 * int(plain.output_gram.state()["images"])


def test_idempotent(observed: GraphModule) -> None:
    graph_module = copy.deepcopy(observed)
    Calibrate().apply(graph_module, PassContext(images()))
    first = copy.deepcopy(observers(graph_module))
    Calibrate().apply(graph_module, PassContext(images()))
    assert_same_statistics(first, observers(graph_module), 0.0)


def test_seed_decides_the_random_draws(observed: GraphModule) -> None:
    same = [calibrated(observed, images(), seed=seed)["observer_head_0"].gram.matrix() for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_no_activation_is_kept(observed: GraphModule) -> None:
    """Observers hold statistics whose size does not grow with the images."""

    def held(count: int) -> dict[str, int]:
        sizes = {}
        for name, observer in calibrated(observed, images(count)).items():
            tensors = [value for value in vars(observer).values() if isinstance(value, Tensor)]
            if observer.histogram is not None:
                kept = [value for value in vars(observer.histogram).values() if isinstance(value, Tensor)]
                assert sum(tensor.numel() for tensor in kept) <= 7 * BUCKETS
            assert all(not tensor.requires_grad and tensor.grad_fn is None for tensor in tensors)
            sizes[name] = sum(tensor.numel() for tensor in tensors)
        return sizes

    assert held(2) == held(9)


def test_only_one_image_of_activations_is_alive(observed: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    worst = 0
    original = Observer.update

    def update(observer: Observer, x: Tensor, weight: Tensor | None = None) -> None:
        nonlocal worst
        original(observer, x, weight)
        alive.append(weakref.ref(x))
        worst = max(worst, sum(reference() is not None for reference in alive))

    monkeypatch.setattr(Observer, "update", update)
    gc.collect()
    calibrated(observed, images(6), batch_size=6)
    operands = sum(len(observers_of(observed, node)) for node in nodes_with_role(observed))
    assert worst <= operands
    assert all(len(value) == 1 for reference in alive if (value := reference()) is not None)
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_statistics_are_those_of_the_edge(observed: GraphModule) -> None:
    x = images(5)
    graph_module = copy.deepcopy(observed)
    seen: list[Tensor] = []
    graph_module.get_submodule("observer_blocks_0_mlp_fc2_0").register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.detach())
    )
    Calibrate(gradient=False).apply(graph_module, PassContext(x, batch_size=5))
    statistics = observers(graph_module)["observer_blocks_0_mlp_fc2_0"].statistics()
    values = torch.cat(seen[-5:])  # images come one by one; before, outlier channels are found
    assert statistics.minimum == float(values.min())
    assert statistics.maximum == float(values.max())
    assert statistics.mean_image_minimum == pytest.approx(float(values.flatten(1).amin(1).mean()))
    assert statistics.moments.count == values.numel()


class TestErrors:
    def test_no_images(self, observed: GraphModule) -> None:
        with pytest.raises(CalibrationError, match="needs calibration images"):
            Calibrate().apply(copy.deepcopy(observed), PassContext())

    @pytest.mark.parametrize("gradient", [True, False])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_activations_that_are_not_finite(self, observed: GraphModule, gradient: bool, bad: float) -> None:
        x = images(4)
        x[2, 0, 0, 0] = bad
        with pytest.raises(CalibrationError, match=r"not finite|NaN or infinite"):
            Calibrate(gradient).apply(copy.deepcopy(observed), PassContext(x))

    def test_overflow_inside_names_the_layer(self, observed: GraphModule) -> None:
        graph_module = copy.deepcopy(observed)
        graph_module.get_submodule("blocks.0.mlp.fc1").weight.data.mul_(1e38)
        with pytest.raises(CalibrationError, match=r"blocks\.0\.mlp\.fc2"):
            Calibrate(gradient=False).apply(graph_module, PassContext(images()))

    def test_output_that_is_not_class_scores(self) -> None:
        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.embed(x).flatten(2).transpose(1, 2))

        torch.manual_seed(0)
        graph_module = traced(Tokens().eval(), images(2, 16))
        plan_and_observe(graph_module)
        with pytest.raises(CalibrationError, match="class scores"):
            Calibrate().apply(graph_module, PassContext(images(2, 16)))
        Calibrate(gradient=False).apply(graph_module, PassContext(images(2, 16)))

    @pytest.mark.parametrize("size", [0, -3])
    def test_batch_size(self, size: int) -> None:
        with pytest.raises(CalibrationError, match="batch_size"):
            PassContext(images(), batch_size=size)


def test_gram_is_the_weighted_sum_over_real_rows(observed: GraphModule) -> None:
    """G = sum a_t x_t x_t^T with a_t the mean squared gradient of token t; b_o makes both sides equal in sum."""
    graph_module = copy.deepcopy(observed)
    x = images(4)
    Calibrate().apply(graph_module, PassContext(x, batch_size=4))
    observer = observers(graph_module)["observer_head_0"]
    head = graph_module.get_submodule("head")
    seen: list[Tensor] = []
    head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].detach()))
    logits = graph_module(x)
    squared = logit_gradients(logits.softmax(1), "signs", 4, seed=0).square().mean(0)
    token = squared.mean(1)
    assert torch.allclose(observer.gram.matrix(), (seen[0] * token[:, None]).T @ seen[0], rtol=1e-3, atol=1e-5)
    assert torch.allclose(observer.channel_weight(), squared.sum(0) / token.sum(), rtol=1e-3)


def test_shrinkage_draws_the_weights_of_tokens_towards_their_image_s_mean(observed: GraphModule) -> None:
    """With 1, G sums X^T X times the mean a_t of each image; half way it is the mean of both. b_o has no part in it."""
    x, name = images(3), "observer_blocks_0_mlp_fc2_0"
    none, half, whole = (calibrated(observed, x, shrinkage=share)[name] for share in (0.0, 0.5, 1.0))
    seen: list[Tensor] = []
    graph_module = copy.deepcopy(observed)
    graph_module.get_submodule(name).register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0][0]))
    for image in x:
        graph_module(image[None])
    # Of each image alone: a_t sums to what its Gram matrix's weights sum to.
    sums = [calibrated(observed, x[: count + 1])[name].token_weight_sum for count in range(3)]
    parts = [total - before for total, before in zip(sums, [0.0, *sums], strict=False)]
    wanted = sum(part / len(rows) * rows.T @ rows for part, rows in zip(parts, seen, strict=True))
    torch.testing.assert_close(whole.gram.matrix(), wanted.detach(), rtol=1e-3, atol=1e-5 * float(wanted.max()))
    assert not torch.allclose(none.gram.matrix(), whole.gram.matrix(), rtol=1e-2)
    torch.testing.assert_close(half.gram.matrix(), (none.gram.matrix() + whole.gram.matrix()) / 2)
    torch.testing.assert_close(half.channel_weight(), none.channel_weight())


def test_output_grams_are_of_the_gradients_at_weights_outputs(observed: GraphModule) -> None:
    """On the diagonal the squares that b_o is made of; of the head, written out; nothing where not asked for."""
    x = images(4)
    found = calibrated(observed, x, outputs=True)
    assert all(observer.output_gram is None for observer in calibrated(observed, x).values())
    for observer in found.values():
        assert (observer.output_gram is None) == (observer.gram is None)
        if observer.output_gram is not None:
            diagonal = observer.output_gram.matrix().diagonal(dim1=1, dim2=2).flatten()
            torch.testing.assert_close(diagonal.double(), observer.output_weight / len(x), rtol=1e-3, atol=1e-9)
    gradients = logit_gradients(copy.deepcopy(observed)(x).softmax(1), "signs", 4, seed=0)  # (draws, images, classes)
    head = found["observer_head_0"]
    own = torch.einsum("dbo,dbp->bop", gradients, gradients) / 4
    torch.testing.assert_close(head.output_gram.state()["sum"][0], own.sum(0), rtol=1e-3, atol=1e-6)
    head.release(keep_gram=True)
    assert head.output_gram is not None
    head.release()
    assert head.output_gram is None


def test_hessian_metric_predicts_the_kl_divergence_of_a_small_error(observed: GraphModule) -> None:
    """Half of sum h e^2, averaged over random signs, is the rise of KL(p || p^) for independent errors e."""
    graph_module = copy.deepcopy(observed)
    x = images(16)
    name = "observer_blocks_0_mlp_fc2_0"
    Calibrate(draws=64).apply(graph_module, PassContext(x, batch_size=16))
    predicted = 0.5 * float(observers(graph_module)[name].statistics().moments.moments[3].sum())
    size, measured = 1e-2, []
    target = graph_module(x).log_softmax(1).double()
    generator = torch.Generator().manual_seed(1)
    observer = graph_module.get_submodule(name)
    for _ in range(24):
        handle = observer.register_forward_hook(
            lambda _m, _i, y: y + size * (torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1)
        )
        moved = graph_module(x).log_softmax(1).double()
        handle.remove()
        measured.append(float(functional.kl_div(moved, target, reduction="sum", log_target=True)) / size**2)
    assert predicted == pytest.approx(sum(measured) / len(measured), rel=0.35)


def test_attention_pool_with_a_constant_query() -> None:
    """SigLIP's pool multiplies a query that no image reaches; its edges are calibrated all the same."""
    model = timm_model("vit_base_patch16_siglip_224", **{**VIT, "depth": 1})
    graph_module = traced(model, images(2))
    plan_and_observe(graph_module)
    Calibrate().apply(graph_module, PassContext(images()))
    assert all(observer.images for observer in observers(graph_module).values())
    assert any(
        float(o.statistics().moments.moments[3].sum()) > 0 for n, o in observers(graph_module).items() if "_q_" in n
    )
