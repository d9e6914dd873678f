"""Augment: other images made from images, to round weights for, or for a quantized network to learn from.

Crops and mirror images; mixtures of two images, blended (mixup, Zhang et al.) or with a rectangle of the one in the
other (CutMix, Yun et al.); colours. A teacher that sees the same image labels it whatever it shows (Beyer et al.,
"Knowledge distillation: a good teacher is patient and consistent"), so few images go a long way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError


@dataclass(frozen=True)
class Augment:
    """What is done to the images of a batch, drawn anew for each.

    Args:
        crop: least share of each side that a crop keeps; 1 leaves images whole.
        mixed: probability that an image is mixed with another. Half of the mixtures are blended, half are pasted.
        colour: how far brightness, contrast and saturation move at most; 0 leaves them. Half of the images are
            mirrored.
    """

    crop: float = 0.4
    mixed: float = 0.7
    colour: float = 0.3

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if not (0 < self.crop <= 1 and 0 <= self.mixed <= 1 and 0 <= self.colour < 1):
            raise CalibrationError(
                f"crop must be above 0 and at most 1, mixed from 0 to 1, colour at least 0 and below 1; found {self}"
            )

    def __call__(self, images_bchw: Tensor, generator: torch.Generator) -> Tensor:
        """Float (B, C, H, W) to as many others, on their device; the generator is the CPU's: all devices draw alike.

        No channel leaves the range that it has in these images: what a model does beyond it, nobody has asked.
        """
        images = random_crops(images_bchw, self.crop, generator)
        images = random_colours(images, self.colour, generator) if self.colour else images
        images = random_mixtures(images, self.mixed, generator) if self.mixed else images
        least, largest = (end(images_bchw, (0, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
        return images.clamp(least, largest)


def random_crops(images_bchw: Tensor, least: float, generator: torch.Generator) -> Tensor:
    """Random parts of the images, at least `least` of each side, scaled to full size; half of them mirrored.

    Args:
        images_bchw: float (B, C, H, W).
        least: the least share of each side that a part has, 0 to 1.
        generator: what the parts are drawn by.
    """
    count = len(images_bchw)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    side = least + (1 - least) * draw(count, 2)
    side = (side.mean(1, keepdim=True) + 0.3 * (side - side.mean(1, keepdim=True))).clamp(least, 1)  # nearly square
    places = torch.zeros(count, 2, 3)
    places[:, (0, 1), (0, 1)] = side
    places[:, 0, 0] *= torch.where(draw(count) < 0.5, -1.0, 1.0)
    places[:, :, 2] = (2 * draw(count, 2) - 1) * (1 - side)
    places = places.to(images_bchw.device)
    grid = functional.affine_grid(places, list(images_bchw.shape), align_corners=False).to(images_bchw)
    return functional.grid_sample(images_bchw, grid, padding_mode="border", align_corners=False)


def random_mixtures(images_bchw: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Some of the images mixed with the image before them in the batch; shares are uniform.

    Args:
        images_bchw: float (B, C, H, W).
        probability: share of the images that are mixed, 0 to 1.
        generator: what images and shares are drawn by.
    """
    count, _, height, width = images_bchw.shape
    others = images_bchw.roll(1, 0)
    chosen, kind, share = torch.rand(3, count, generator=generator).unbind()
    places = torch.rand(2, count, generator=generator)
    weight = torch.zeros(count, 1, height, width)  # of the other image
    for index in torch.nonzero(chosen < probability)[:, 0].tolist():
        if kind[index] < 0.5:
            weight[index] = share[index]
            continue
        side = float(share[index]) ** 0.5
        (top, bottom), (left, right) = (
            (round(float(place) * (1 - side) * size), round((float(place) * (1 - side) + side) * size))
            for place, size in zip(places[:, index], (height, width), strict=True)
        )
        weight[index, :, top:bottom, left:right] = 1
    return images_bchw.lerp(others, weight.to(images_bchw))


def random_colours(images_bchw: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Images with other brightness, contrast and saturation: scaled and shifted about their means.

    Args:
        images_bchw: float (B, C, H, W).
        strength: how far brightness, contrast and saturation move at most; 0: not at all.
        generator: what the changes are drawn by.
    """
    count = len(images_bchw)
    contrast, saturation, shift = (2 * torch.rand(3, count, 1, 1, 1, generator=generator) - 1).to(images_bchw).unbind()
    mean, grey = images_bchw.mean((1, 2, 3), keepdim=True), images_bchw.mean(1, keepdim=True)
    coloured = grey + (images_bchw - grey) * (1 + strength * saturation)
    return mean + (coloured - mean) * (1 + strength * contrast) + strength * shift * images_bchw.std()
