"""How a picture becomes the model's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import timm.data
from PIL import Image
from torch import Tensor, nn

from fxquant.checks.hints import check_fields
from fxquant.data import embedded
from fxquant.errors import DataError

_LARGEST_SIDE = 16_384


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input: resize to size / crop_pct, centre crop, normalize.

    Args:
        input_size: channels, height and width of the model's input.
        crop_pct: share of the resized picture's side that the crop keeps, above 0 and at most 1.
        mean, std: what is subtracted from pixels in 0..1, and what the rest is divided by; a number for each channel.
        interpolation: how pictures are resized: nearest, bilinear or bicubic.
        crop_mode: what is resized, by timm's names. center: the short side, so that ends of the long one are cropped.
            squash: both sides, so that pictures lose their proportions. border: the long side, and the rest is filled
            with the mean.
    """

    input_size: tuple[int, int, int]
    crop_pct: float = 1.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        """Raise DataError for values that make no preprocessing."""
        check_fields(self, DataError)
        if self.input_size[0] not in (1, 3) or not 1 <= min(self.input_size) <= max(self.input_size) <= _LARGEST_SIDE:
            raise DataError(
                f"input_size must be (1 or 3 channels, height, width), sides up to {_LARGEST_SIDE:,}, found "
                f"{self.input_size}"
            )
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise DataError(f"interpolation must be nearest, bilinear or bicubic, found {self.interpolation!r}")
        if self.crop_mode not in ("center", "squash", "border"):
            raise DataError(f"crop_mode must be center, squash or border, found {self.crop_mode!r}")
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct must be above 0 and at most 1, found {self.crop_pct}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.input_size[0]:
                raise DataError(f"{name} needs {self.input_size[0]} numbers, one a channel, found {list(values)}")
        if min(self.std) <= 0:
            raise DataError(f"std must be positive, found {list(self.std)}")

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """What timm says the model was trained with."""
        config = timm.data.resolve_model_data_config(model)
        channels = int(config["input_size"][0])
        return cls(
            input_size=tuple(config["input_size"]),
            crop_pct=float(config["crop_pct"]),
            mean=tuple(config["mean"])[:channels],
            std=tuple(config["std"])[:channels],
            interpolation=config["interpolation"] if config["interpolation"] != "random" else "bilinear",
            crop_mode=config["crop_mode"] or "center",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Inverse of `to_dict`; raises DataError for anything else."""
        try:
            return cls(**values)
        except DataError:
            raise
        except TypeError as error:
            raise DataError.for_type(f"not a preprocessing: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def with_options(self, **options: Any) -> Preprocessing:
        """With the options that are not None replaced; `image_size` sets height and width."""
        given = {key: value for key, value in options.items() if value is not None}
        names = ("image_size", *(field.name for field in fields(self)))
        if unknown := [name for name in given if name not in names]:
            raise DataError.for_type(f"a preprocessing has no option {unknown[0]!r}; it has {', '.join(names)}")
        if (size := given.pop("image_size", None)) is not None:
            given["input_size"] = (self.input_size[0], size, size)
        return replace(self, **given)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """From a picture to a float32 tensor (C, H, W), as timm evaluates.

        What it returns raises DataError for a picture that would have more pixels than PIL reads, once it is resized.
        """
        found: Callable[[Image.Image], Tensor] = timm.data.create_transform(**asdict(self), is_training=False)
        mode = "L" if self.input_size[0] == 1 else "RGB"

        def transformed(picture: Image.Image) -> Tensor:
            if self._resized_pixels(*picture.size) > (Image.MAX_IMAGE_PIXELS or math.inf):
                width, height = picture.size
                wanted = " x ".join(f"{side / self.crop_pct:.0f}" for side in self.input_size[1:])
                raise DataError(f"a picture of {height} x {width} is too narrow to be resized to {wanted} at least")
            return found(picture.convert(mode))

        return transformed

    def _resized_pixels(self, width: int, height: int) -> float:
        """Pixels of a resized picture before the crop."""
        tall, wide = (side / self.crop_pct for side in self.input_size[1:])
        if self.crop_mode == "squash":
            return tall * wide
        factor = (max if self.crop_mode == "center" else min)(tall / height, wide / width)
        return factor**2 * width * height


EMBEDDED = Preprocessing((1, 28, 28), mean=(embedded.MEAN,), std=(embedded.STD,))
