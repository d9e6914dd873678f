"""Outlines: heights by hand, both ends, and what a file may not say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxquant.errors import ArtefactError
from fxquant.quantizers.statistics.histogram import Bfloat16Histogram
from fxquant.quantizers.statistics.outline import BINS, ROW, Outline

pytestmark = pytest.mark.quick


def test_heights_are_logarithms_of_the_fullest_bin() -> None:
    values = torch.cat([torch.zeros(1000), torch.full((1,), 4.0), torch.full((1,), -4.0)])
    found = Outline.of_tensor(values)
    assert (found.low, found.high) == (-4, 4)
    assert found.heights[BINS // 2] == 255
    assert found.heights[0] == found.heights[-1] == round(255 * (1 - 3 / 6)), "a thousandth of the fullest"
    assert sum(map(bool, found.heights)) == 3


def test_a_tensor_and_its_moments_have_one_outline() -> None:
    values = torch.randn(20_000)
    histogram = Bfloat16Histogram()
    histogram.update(values)
    pairs = zip(Outline.of_tensor(values).heights, Outline.of_moments(histogram.finish()).heights, strict=True)
    assert all(abs(first - second) < 25 for first, second in pairs if min(first, second) > 120)


def test_a_constant_has_an_outline() -> None:
    for value in (0.0, 3.0, -1e-9):
        found = Outline.of_tensor(torch.full((5,), value))
        assert found.low < value < found.high
        assert max(found.heights) == 255


def test_json_round_trip() -> None:
    found = Outline(-1.0, 2.5, tuple(range(BINS)), ROW)
    assert Outline.from_json(found.to_json(), "it") == found


@pytest.mark.parametrize(
    "values",
    [
        None, [], [0, 1, "value"], [1, 1, "value", [0] * BINS], [0, 1, "value", [0] * 39], [0, 1, "row", [256] * BINS],
        [0, 1, "<b>", [0] * BINS], ["0", 1, "value", [0] * BINS], [0, 1, "value", [0.5] * BINS],
    ],
)  # fmt: skip
def test_files_that_say_something_else_are_refused(values: Any) -> None:
    with pytest.raises(ArtefactError, match="the histogram of fc1"):
        Outline.from_json(values, "the histogram of fc1")
