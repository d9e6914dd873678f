"""How many images are made and how, and what images a model takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxquant.checks.arguments import whole
from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from fxquant.graph.capture.equivalence import known_image_shape

PAPER_NORMS = 4 * math.sqrt(32 * 3 * 224 * 224)  # sum of four norms for a root mean square difference of 1
PAPER_STD = 0.226  # of the normalisation its pixels are in (ImageNet's, mean over channels)
_LARGEST_SIDE = 16_384


@dataclass(frozen=True)
class Synthesis:
    """How calibration images are made.

    Args:
        count: how many images are made.
        steps: how many steps each of the two stages takes. The paper takes 500 (`Synthesis.thorough()`); from the
            default on, accuracy after quantization rises by no more than its standard error
            (docs/explanation/methods.md).
        learning_rate: Adam's rate on normalised pixels; the paper takes 0.25 for Swin.
        variation: the range V* is drawn from at 224 x 224, in units of the picture's range.
        jitter: largest shift in the second stage, as a share of the image's side.
        image_shape: (channels, height, width), where the model does not say.
        mean, std: of the model's normalisation, per channel, where the model does not say.
        checkpoint_steps: after how many steps unfinished work is kept, where there is a cache.
    """

    count: int = 32
    steps: int = 30
    learning_rate: float = 0.2
    variation: tuple[float, float] = (
        2500 / PAPER_NORMS * PAPER_STD,
        3000 / PAPER_NORMS * PAPER_STD,
    )
    jitter: float = 30 / 224
    image_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    checkpoint_steps: int = field(default=25, compare=False)

    @classmethod
    def thorough(cls, count: int = 32) -> Synthesis:
        """The paper's 2 x 500 steps."""
        return cls(count=count, steps=500)

    def __post_init__(self) -> None:
        """Raise CalibrationError for options out of range."""
        check_fields(self, CalibrationError)
        least, most = self.variation
        for name in ("count", "steps", "checkpoint_steps"):
            whole(name, getattr(self, name), CalibrationError, least=1, most=1_000_000)
        if self.image_shape is not None and not 1 <= min(self.image_shape) <= max(self.image_shape) <= _LARGEST_SIDE:
            raise CalibrationError(
                f"image_shape is (channels, height, width), each 1 to {_LARGEST_SIDE:,}, found {self}"
            )
        if not self.learning_rate > 0 or not 0 <= least <= most or not 0 <= self.jitter < 1:
            raise CalibrationError(
                f"learning_rate must be above 0, variation a range of numbers from 0 on, and jitter "
                f"at least 0 and below 1; found {self}"
            )

    def described(self, seed: int) -> str:
        """For the protocol card."""
        return f"synthesised (PSAQ-ViT, {self.count} images, 2 x {self.steps} steps, seed {seed})"


@dataclass(frozen=True)
class Pictures:
    """What the model takes.

    Args:
        shape: (channels, height, width) of an image.
        mean, std: per channel, what pixels of 0..1 are normalised with.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, options: Synthesis = Synthesis()) -> Pictures:
        """What the options say, else what the model says: its patch embedding, `pretrained_cfg` or `default_cfg`.

        Without a word on normalisation, mean and std are 0.5. Raises CalibrationError where the shape is not known.
        """
        found = options.image_shape or known_image_shape(model)
        if found is None or len(found) != 3:
            raise CalibrationError(
                f"the image size of {type(model).__name__} is not known (no patch_embed.img_size, no pretrained_cfg): "
                "give calibration images, or calibration=Synthesis(image_shape=(channels, height, width))"
            )
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        channels, height, width = found
        given = [options.mean or config.get("mean"), options.std or config.get("std")]
        numbers = [tuple(map(float, value))[:channels] if value else (0.5,) * channels for value in given]
        if any(len(value) != channels for value in numbers) or min(numbers[1]) <= 0:
            raise CalibrationError(f"mean and std need {channels} numbers, std positive; found {numbers}")
        return cls((channels, height, width), numbers[0], numbers[1])

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """The normalised values of black and white, float32 (1, channels, 1, 1) each."""
        mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (self.mean, self.std))
        return -mean / std, (1 - mean) / std
