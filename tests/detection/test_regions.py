"""Features of regions as plain operations: those of torchvision, and regions that ride along with images."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from fxquant.detection.regions import Planes, RegionPool
from fxquant.errors import CalibrationError, ModelError

pytestmark = pytest.mark.quick
HEIGHT, WIDTH = 256, 384


def test_features_are_those_of_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = {str(i): torch.randn(2, 5, 64 >> i, 96 >> i, generator=generator) for i in range(3)}
    corners = torch.rand(2, 9, 2, generator=generator) * torch.tensor([300.0, 200.0])
    sides = torch.rand(2, 9, 2, generator=generator) * torch.tensor([80.0, 50.0])
    boxes = torch.cat([corners, corners + sides], 2)
    boxes[:, 0] = torch.tensor([3.0, 5.0, 370.0, 250.0])  # of the coarsest map
    pool = MultiScaleRoIAlign(["0", "1", "2"], 7, sampling_ratio=2)
    expected = pool(maps, list(boxes), [(HEIGHT, WIDTH)] * 2)
    shares = boxes / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    found = RegionPool.of(pool).features(maps, shares, (HEIGHT, WIDTH))
    assert torch.allclose(found, expected, atol=2e-4)
    assert not torch.allclose(found[:9], expected[9:], atol=0.1)


def test_regions_come_back_from_planes() -> None:
    planes = Planes(3, (4, 2))
    images = torch.rand(2, 3, 8, 16)
    regions = [torch.rand(2, 4, 4) * 8, torch.rand(2, 2, 4) * 8]
    packed = planes.packed(images, regions)
    assert packed.shape == (2, 4, 8, 16)
    assert torch.equal(planes.images(packed), images)
    sides = torch.tensor([16.0, 8.0, 16.0, 8.0])
    for found, given in zip(planes.regions(packed), regions, strict=True):
        assert torch.allclose(found * sides, given)


def test_more_regions_than_pixels_are_refused() -> None:
    with pytest.raises(CalibrationError, match="do not fit an image of 2 x 2"):
        Planes(3, (4,)).packed(torch.rand(1, 3, 2, 2), [torch.rand(1, 4, 4)])


def test_pools_that_are_not_known_are_refused() -> None:
    with pytest.raises(ModelError, match="sampling_ratio=-1"):
        RegionPool.of(MultiScaleRoIAlign(["0"], 7, sampling_ratio=-1))
    with pytest.raises(ModelError, match="Identity"):
        RegionPool.of(torch.nn.Identity())
