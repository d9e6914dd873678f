"""Views of calibration images: how many, and that they follow from the seed alone."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import CalibrationError
from passes.recipes import best
from passes.search.augment import Augment
from passes.search.calibrate import Calibrate
from passes.search.views import Views
from tests.models import images


@pytest.mark.parametrize(("count", "expected"), [(1, 7), (32, 7), (33, 6), (64, 3), (128, 1), (129, 0), (1000, 0)])
def test_many_images_have_fewer_views(count: int, expected: int) -> None:
    assert Views(each=7, together=256).of_each(count) == expected


def test_a_view_follows_from_seed_and_number() -> None:
    x, views = images(4), Views()
    first = views.view(x, 1, seed=0)
    assert first.shape == x[:1].shape
    assert torch.equal(first, views.view(x, 1, seed=0))
    assert not torch.equal(first, views.view(x, 5, seed=0)), "another view of the same image"
    assert not torch.equal(first, views.view(x, 1, seed=1))


def test_a_view_shows_its_image_or_the_mirror_image() -> None:
    x, views = images(4), Views(augment=Augment(crop=1, mixed=0, colour=0))
    for index in range(8):
        shown, image = views.view(x, index, seed=0)[0], x[index % 4]
        errors = [float((shown - each).abs().max()) for each in (image, image.flip(-1))]
        assert min(errors) < 1e-4


def test_no_channel_of_a_view_leaves_the_range_of_the_images() -> None:
    x, views = images(2), Views(augment=Augment(colour=0.9))
    least, largest = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    for index in range(8):
        shown = views.view(x, index, seed=0)
        assert bool(((shown >= least) & (shown <= largest)).all())


def test_one_image_alone_has_views() -> None:
    assert torch.isfinite(Views().view(images(1), 3, seed=0)).all()


@pytest.mark.parametrize("options", [{"each": -1}, {"together": -1}, {"draws": 0}, {"augment": None}])
def test_options_that_do_not_fit(options: dict[str, object]) -> None:
    with pytest.raises(CalibrationError):
        Views(**options)


def test_best_has_views() -> None:
    (calibrate,) = [step for step in best("W4A8") if isinstance(step, Calibrate)]
    assert calibrate.views == Views()
