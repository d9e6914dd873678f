from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.data import embedded
from fxquant.errors import CalibrationError, InfeasibleBudgetError
from fxquant.synthesis.descent import Watched
from fxquant.synthesis.pictures import Pictures, Synthesis
from fxquant.synthesis.priors import variation
from fxquant.synthesis.synthesize import synthesize, trace_without_images
from passes.pipeline.contract import PassContext
from passes.prepare.assign_roles import AssignRoles
from tests.models import SWIN, VIT, timm_model, vit

QUICK = Synthesis(count=3, steps=2)
EMBEDDED = Synthesis(count=4, steps=8, mean=(embedded.MEAN,), std=(embedded.STD,))


def watched(model: nn.Module) -> list[int]:
    """Prefix tokens of every attention that is looked at."""
    traced = trace_without_images(model, Pictures.of(model))
    AssignRoles().apply(traced, PassContext())
    return list(Watched(traced).prefix.values())


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vit_tiny_patch16_224", VIT | {"img_size": 64}, [1, 1]),
        ("vit_tiny_patch16_224", VIT | {"img_size": 64, "class_token": False, "global_pool": "avg"}, [0, 0]),
        ("vit_tiny_patch16_224", VIT | {"img_size": 64, "in_chans": 1, "reg_tokens": 4}, [5, 5]),
        ("deit_tiny_distilled_patch16_224", VIT | {"img_size": 64}, [2, 2]),
        ("swin_tiny_patch4_window7_224", SWIN, [0] * 4),
        ("vit_base_patch16_siglip_224", {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 3}, [0]),
    ],
)
def test_prefix_tokens_follow_from_the_graph(name: str, options: dict[str, Any], expected: list[int]) -> None:
    model = timm_model(name, **options)
    assert watched(model) == expected
    images = synthesize(model, replace(QUICK, count=1, steps=1))
    assert images.shape == (1, options.get("in_chans", 3), options["img_size"], options["img_size"])
    assert bool(torch.isfinite(images).all())


class Unsized(nn.Module):
    """An attention over patches whose image size nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Conv2d(1, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return self.head(((q @ k.transpose(1, 2)).softmax(-1) @ v).mean(1))


def test_the_image_size_may_be_given() -> None:
    torch.manual_seed(0)
    with pytest.raises(CalibrationError, match="image_shape="):
        synthesize(Unsized(), QUICK)
    assert synthesize(Unsized(), replace(QUICK, image_shape=(1, 16, 16))).shape == (3, 1, 16, 16)
    compiled = fxquant.compile(Unsized(), "W8A8", calibration=replace(QUICK, image_shape=(1, 16, 16)))
    assert compiled.card["image_shape"] == [1, 16, 16]


def test_a_model_without_attention_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(CalibrationError, match="no attention over patches"):
        synthesize(model, replace(QUICK, image_shape=(3, 8, 8)))


@pytest.mark.parametrize("options", [{"count": 0}, {"steps": 0}, {"learning_rate": 0}, {"variation": (2, 1)}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError):
        Synthesis(**options)


def test_same_seed_same_images_and_another_seed_others() -> None:
    model = vit(depth=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = synthesize(model, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(synthesize(model, QUICK), first)
    assert not torch.allclose(synthesize(model, QUICK, seed=1), first)
    apart = (synthesize(model, QUICK, batch_size=2) - first).abs()
    assert apart[:2].max() < 1e-3, "images do not influence each other"


class Steps:
    """A reporter of progress that knows the steps taken, and interrupts after so many."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.taken: list[int] = []
        self.labels: list[str] = []
        self.stop_after = stop_after

    def track(self, label: str, total: int) -> Steps:
        self.labels.append(label)
        return self

    def advance(self, units: int = 1) -> None:
        if units:
            self.taken.append(units)
        if sum(self.taken) == self.stop_after:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    model, options = vit(depth=1), Synthesis(count=3, steps=6, checkpoint_steps=2)
    expected = synthesize(model, options, batch_size=2)
    stopped = Steps(stop_after=12 + 5)
    with pytest.raises(KeyboardInterrupt):
        synthesize(model, options, batch_size=2, cache=tmp_path, progress=stopped)
    for expected_steps in ([12, 4, *[1] * 8], [12, 12]):  # the first chunk was whole, the second had a checkpoint
        steps = Steps()
        assert torch.equal(synthesize(model, options, batch_size=2, cache=tmp_path, progress=steps), expected)
        assert steps.taken == expected_steps


def test_images_come_nearer_to_what_the_loss_asks_for() -> None:
    model = embedded.load_model().requires_grad_(False)
    traced = trace_without_images(model, Pictures.of(model, EMBEDDED))
    AssignRoles().apply(traced, PassContext())
    running, labels = Watched(traced), torch.zeros(4, dtype=torch.long)
    low, high = Pictures.of(model, EMBEDDED).limits
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)).clamp(low, high)
    images = synthesize(model, EMBEDDED)
    assert images.amin() >= low.item()
    assert images.amax() <= high.item()
    target = 0.5 * sum(EMBEDDED.variation) * 8**0.25
    off = [float((variation(x * embedded.STD) - target).abs().mean()) for x in (noise, images)]
    assert off[1] < 0.25 * off[0]
    running.losses(noise, labels)
    with torch.no_grad():
        entropy = []
        for x in (noise, images):
            with_class = [running.losses(x, torch.full((4,), label)) for label in range(10)]
            entropy.append(float((torch.stack(with_class).amin(0)).mean()))
    assert entropy[1] < entropy[0]


def test_compile_without_data_says_so_and_works() -> None:
    model = embedded.load_model()
    compiled = fxquant.compile(model, "W6A6", calibration=EMBEDDED, seed=3)
    assert compiled.card["calibration"] == "synthesised (PSAQ-ViT, 4 images, 2 x 8 steps, seed 3)"
    assert compiled.card["calibration_images"] == 4
    assert "synthesised (PSAQ-ViT, 4 images" in str(compiled.report())
    pictures, labels = embedded.test_images(300)
    with torch.no_grad():
        right = float((compiled(pictures).argmax(1) == labels).float().mean())
    assert right > 0.8
    given = fxquant.compile(model, "W6A6", calibration=synthesize(model, EMBEDDED, seed=3), seed=3)
    assert torch.equal(given(pictures), compiled(pictures))
    assert given.card["calibration"] == "4 images given"


def test_a_budget_out_of_reach_is_refused_before_images_are_made() -> None:
    steps = Steps()
    with pytest.raises(InfeasibleBudgetError):
        fxquant.compile(vit(depth=1), "W1A1", progress=steps)
    assert steps.labels == ["tracing the model"]
