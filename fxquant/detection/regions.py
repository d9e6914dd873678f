"""Features of regions as plain tensor operations, so that a detector's heads and its maps are one graph.

RoIAlign (He et al., 2017) samples a map at points of a regular grid in each region, bilinearly, and averages
neighbouring samples; `torch.nn.functional.grid_sample` does that for a fixed number of regions in every image. A region
is cut from the map that fits its size (Lin et al., 2017, equation 1). For regions within the image this gives what
torchvision's MultiScaleRoIAlign gives, whose own code picks regions by their values and cannot be traced.

Regions ride along with an image, since a graph takes one tensor: they fill the beginning of a further plane below its
colours, as fractions of the image's width and height. `Planes` packs and unpacks them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import MultiScaleRoIAlign

from fxquant.errors import CalibrationError, ModelError

_LEAST_AREA = 1e-6  # square pixels; what has less is no region, and its level is of no account


@dataclass(frozen=True)
class Planes:
    """Colours of an image and, in one more plane, regions: (B, colours + 1, H, W).

    Args:
        colours: channels of an image.
        counts: how many regions each head is given of an image.
    """

    colours: int
    counts: tuple[int, ...]

    def packed(self, images_bchw: Tensor, regions: Sequence[Tensor]) -> Tensor:
        """Images with their regions.

        images_bchw: float (B, colours, H, W). regions: for each head (B, count, 4), corners (x1, y1, x2, y2) in pixels.

        Raises CalibrationError where the image is too small to hold them.
        """
        batch, _, height, width = images_bchw.shape
        sides = images_bchw.new_tensor([width, height, width, height])
        numbers = torch.cat([(found / sides).flatten(1) for found in regions], 1)
        if numbers.shape[1] > height * width:
            raise CalibrationError(
                f"{sum(self.counts)} regions do not fit an image of {height} x {width}: ask for fewer"
            )
        plane = images_bchw.new_zeros(batch, height * width)
        plane[:, : numbers.shape[1]] = numbers
        return torch.cat([images_bchw, plane.reshape(batch, 1, height, width)], 1)

    def without(self, images_bchw: Tensor) -> Tensor:
        """Images with an empty plane, for parts that need no regions."""
        return functional.pad(images_bchw, (0, 0, 0, 0, 0, 1))

    def images(self, planes_bchw: Tensor) -> Tensor:
        """The images (B, colours, H, W)."""
        return planes_bchw[:, : self.colours]

    def regions(self, planes_bchw: Tensor) -> list[Tensor]:
        """For each head (B, count, 4), corners in fractions of the image."""
        numbers = planes_bchw[:, self.colours].flatten(1)
        ends = [4 * sum(self.counts[: index + 1]) for index in range(len(self.counts))]
        pairs = zip(self.counts, ends, strict=True)
        return [numbers[:, end - 4 * count : end].reshape(-1, count, 4) for count, end in pairs]


@dataclass(frozen=True)
class RegionPool:
    """What a MultiScaleRoIAlign does, for a fixed number of regions in every image.

    Args:
        names: of the maps that regions are cut from, finest first.
        pixels: of a region's features, height and width.
        samples: points along a side of each pixel.
        canonical_side, canonical_level: of the square region that is cut from the map of that level.
    """

    names: tuple[str, ...]
    pixels: tuple[int, int]
    samples: int
    canonical_side: int
    canonical_level: int

    @classmethod
    def of(cls, pool: Any) -> RegionPool:
        """What a pool of torchvision does. Raises ModelError for any other, and one whose points are not fixed."""
        if type(pool) is not MultiScaleRoIAlign:
            raise ModelError(f"regions are pooled by a {type(pool).__name__}, and only a MultiScaleRoIAlign is known")
        if pool.sampling_ratio < 1:
            raise ModelError(
                f"the pool samples as many points as a region is large (sampling_ratio={pool.sampling_ratio}): give it "
                f"a number, as torchvision's own detectors do (2)"
            )
        pixels = tuple(map(int, pool.output_size))
        side, level = int(pool.canonical_scale), int(pool.canonical_level)
        return cls(tuple(pool.featmap_names), (pixels[0], pixels[1]), int(pool.sampling_ratio), side, level)

    def features(self, maps: dict[str, Tensor], corners_bk4: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Features of the regions, (B K, C, height, width).

        Args:
            maps: by name, (B, C, h, w).
            corners_bk4: (B, K, 4), in fractions of the image.
            image_size: height and width in pixels.
        """
        chosen = [maps[name] for name in self.names if name in maps]
        scales = [2.0 ** round(math.log2(found.shape[2] / image_size[0])) for found in chosen]
        height, width = image_size
        x1, y1, x2, y2 = (corners_bk4[..., index] for index in range(4))
        x1, x2, y1, y2 = x1 * width, x2 * width, y1 * height, y2 * height
        first, last = (-round(math.log2(scale)) for scale in (scales[0], scales[-1]))
        side = ((x2 - x1) * (y2 - y1)).clamp(min=_LEAST_AREA).sqrt()
        level = torch.floor(self.canonical_level + torch.log2(side / self.canonical_side) + 1e-6).clamp(first, last)
        found: Any = 0
        for index, (values, scale) in enumerate(zip(chosen, scales, strict=True)):
            cut = self._cut(values, x1 * scale, y1 * scale, x2 * scale, y2 * scale)
            fits = (level == first + index).to(cut.dtype)[:, :, None, None, None]
            found = found + cut * fits
        return found.flatten(0, 1)  # type: ignore[no-any-return]

    def _cut(self, values: Tensor, x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
        """Features (B, K, C, height, width) of regions (B, K) whose corners are in pixels of one map.

        Args:
            values: the map (B, C, h, w).
            x1, y1, x2, y2: (B, K).
        """
        rows, columns = (pixels * self.samples for pixels in self.pixels)
        y = _points(y1, y2, rows, values.shape[2])
        x = _points(x1, x2, columns, values.shape[3])
        grid = torch.stack(
            [x[:, :, None, :].expand(-1, -1, rows, -1), y[:, :, :, None].expand(-1, -1, -1, columns)], -1
        )
        sampled = functional.grid_sample(values, grid.flatten(1, 2), padding_mode="border", align_corners=True)
        pooled = functional.avg_pool2d(sampled, self.samples)
        return pooled.reshape(-1, values.shape[1], x1.shape[1], *self.pixels).permute(0, 2, 1, 3, 4)


def _points(first: Tensor, last: Tensor, count: int, size: int) -> Tensor:
    """Places of samples (B, K, count) from -1 to 1 along a side of a map, between two ends (B, K) in pixels."""
    length = (last - first).clamp(min=1.0)
    shares = (torch.arange(count, dtype=first.dtype, device=first.device) + 0.5) / count
    places = first[:, :, None] + length[:, :, None] * shares
    return places * (2 / max(size - 1, 1)) - 1
