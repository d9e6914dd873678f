"""Views: what Gram matrices see beside the calibration images, other images made from them.

Weights are rounded for the tokens in Gram matrices. Those of 32 images leave much unsaid, and a network rounded
for them alone is two to three times as far from the float one on other images as on these. The gradients that weigh
tokens need no labels, so any image will do: crops, mirror images, other colours and mixtures of the calibration images
(`passes.search.augment`) are further tokens, at the price of a forward and `draws` backward passes each. Of mixtures a
model is less sure, so their gradients are larger, and in sums of squared gradients they outweigh the images.

A view says nothing of activations' ranges: it is no image that the model is going to see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from passes.search.augment import Augment


@dataclass(frozen=True)
class Views:
    """How many views there are, and what they show. Sums go over images and views alike.

    Args:
        each: how many of every image, at most.
        together: how many images and views there are at most: of many images there are fewer views, or none.
        draws: how many backward passes each view gets.
        augment: what is done to the images.
    """

    each: int = 3
    together: int = 256
    draws: int = 2
    augment: Augment = Augment()

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if self.each < 0 or self.together < 0 or self.draws < 1:
            raise CalibrationError(f"each and together must be at least 0, draws at least 1; found {self}")

    def of_each(self, images: int) -> int:
        """How many views there are of each of so many images."""
        return max(0, min(self.each, self.together // images - 1))

    def view(self, images_bchw: Tensor, index: int, seed: int) -> Tensor:
        """A view of one image, float (1, C, H, W), mixed with another one perhaps.

        Args:
            images_bchw: all calibration images, float (B, C, H, W).
            index: the number of the view, from 0; it shows the image of that number, counted round.
            seed: the seed that all views follow from.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        other = int(torch.randint(len(images_bchw), (), generator=generator))
        return self.augment(images_bchw[[other, index % len(images_bchw)]], generator)[1:]
