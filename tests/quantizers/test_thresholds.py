"""Counting thresholds below values: by a table of buckets as by a search."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.quantizers import thresholds
from fxquant.quantizers.adalog import AdaLogQuantizer
from fxquant.quantizers.level_table import LevelTableQuantizer
from fxquant.quantizers.log_sqrt2 import LogSqrt2Quantizer
from fxquant.quantizers.thresholds import thresholds_below
from fxquant.quantizers.twin_uniform import TwinUniformQuantizer

pytestmark = pytest.mark.quick

QUANTIZERS = {
    "adalog": AdaLogQuantizer(4, 0.9, 30),
    "adalog with an offset": AdaLogQuantizer(6, 3.1, 20, 0.17),
    "levels that vanish": AdaLogQuantizer(8, 1.0, 138),
    "log-sqrt2": LogSqrt2Quantizer(3, 0.9),
    "several in a bucket": TwinUniformQuantizer(8, 0.3, 0.07, True),
}
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, math.inf, -math.inf, 3e38, -3e38, math.nan, -math.nan]


@pytest.fixture(autouse=True)
def _always_by_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "MANY", 0)


def near(values: Tensor) -> Tensor:
    """The values and their neighbours among floats."""
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    return torch.cat([values, values.nextafter(up), values.nextafter(down)])


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_every_value_has_the_count_of_a_search(quantizer: LevelTableQuantizer) -> None:
    levels = quantizer.levels()
    middles = (levels[1:] + levels[:-1]) / 2
    draw = torch.Generator().manual_seed(0)
    values = torch.cat([near(middles), near(levels), torch.randn(2000, generator=draw) / 3, torch.tensor(SPECIAL)])
    assert torch.equal(quantizer.quantize(values), torch.bucketize(values, middles, out_int32=True))


def test_shapes_and_strides_are_kept() -> None:
    x, middles = torch.randn(5, 7, 3).transpose(0, 2), torch.tensor([-0.5, 0.0, 0.25])
    found = thresholds_below(x.requires_grad_(), middles)
    assert (found.shape, found.dtype) == (x.shape, torch.int32)
    assert torch.equal(found, torch.bucketize(x.contiguous(), middles, out_int32=True))
    assert thresholds_below(x[:0], middles).shape == (0, 7, 5)
    assert thresholds_below(x, middles[:0]).eq(0).all()
