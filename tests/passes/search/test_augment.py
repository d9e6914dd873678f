"""Augment: other images of the same kind, drawn anew each time, the same for the same generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.data import embedded
from fxquant.errors import CalibrationError
from passes.search.augment import Augment, random_colours, random_crops, random_mixtures

pytestmark = pytest.mark.quick

IMAGES = embedded.calibration_images(16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels() -> Tensor:
    """Image i is i everywhere: (32, 1, 16, 16)."""
    return torch.arange(32.0).reshape(-1, 1, 1, 1).expand(-1, 1, 16, 16)


def test_a_crop_of_everything_is_the_image_or_its_mirror() -> None:
    found = random_crops(IMAGES, 1.0, generator())
    mirrored = 0
    for image, crop in zip(IMAGES, found, strict=True):
        same, turned = (float((crop - other).abs().max()) < 1e-3 for other in (image, image.flip(-1)))
        assert same or turned
        mirrored += turned
    assert 0 < mirrored < 16


def test_crops_stay_inside_the_image() -> None:
    """Of a ramp from 0 to 1, a crop that keeps half a side or more shows a range between 0.4 and 1."""
    ramp = torch.linspace(0, 1, 64).expand(8, 1, 64, 64)
    spread = random_crops(ramp, 0.5, generator()).flatten(1)
    assert bool((spread.amax(1) - spread.amin(1) >= 0.4).all())
    assert float(spread.min()) >= 0
    assert float(spread.max()) <= 1


def test_mixtures_are_blends_or_pastes_of_two_neighbours() -> None:
    blended = pasted = 0
    for index, found in enumerate(random_mixtures(levels(), 1.0, generator())):
        values = found.unique().tolist()
        own, other = float(index), float((index - 1) % 32)
        assert all(min(own, other) - 1e-4 <= value <= max(own, other) + 1e-4 for value in values)
        if set(values) <= {own, other}:
            pasted += 1
        else:
            assert len(values) == 1
            blended += 1
    assert blended > 5
    assert pasted > 5


def test_no_more_are_mixed_than_asked_for() -> None:
    assert torch.equal(random_mixtures(levels(), 0.0, generator()), levels())
    untouched = (random_mixtures(levels(), 0.5, generator()) == levels()).flatten(1).all(1)
    assert 6 < int(untouched.sum()) < 26


def test_colours_keep_shape_and_rough_size() -> None:
    found = random_colours(IMAGES, 0.3, generator())
    assert found.shape == IMAGES.shape
    assert not torch.equal(found, IMAGES)
    assert float((found - IMAGES).abs().mean()) < float(IMAGES.std())
    torch.testing.assert_close(random_colours(IMAGES, 0.0, generator()), IMAGES)


def test_same_draws_same_images() -> None:
    augment = Augment(0.5, 0.5, 0.3)
    assert torch.equal(augment(IMAGES, generator()), augment(IMAGES, generator()))
    assert not torch.equal(augment(IMAGES, generator()), augment(IMAGES, generator(1)))


@pytest.mark.parametrize("options", [{"crop": 1.5}, {"crop": 0.0}, {"mixed": 1.1}, {"colour": 1.0}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(CalibrationError, match="crop must be above 0"):
        Augment(**options)
