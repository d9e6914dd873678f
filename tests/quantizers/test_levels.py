"""Levels of quantizers of every kind, by asking them."""

from __future__ import annotations

import pytest
import torch

from fxquant.quantizers.codebook import CodebookQuantizer
from fxquant.quantizers.levels import levels_of
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.row_log import RowLogQuantizer
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer
from fxquant.quantizers.uniform import UniformQuantizer

pytestmark = pytest.mark.quick


def test_uniform_levels_are_all_codes() -> None:
    assert levels_of(UniformQuantizer(3, 0.5)) == (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5)
    assert levels_of(UniformQuantizer(2, 1.0, 1)) == (-1, 0, 1, 2)
    assert len(levels_of(UniformQuantizer(5, 0.0123))) == 32


def test_many_levels_are_told_by_their_ends() -> None:
    assert levels_of(UniformQuantizer(8, 1.0)) == (-128, 127)


def test_of_several_scales_the_median_one_counts() -> None:
    scales = torch.tensor([1.0, 4.0, 2.0])
    assert levels_of(UniformQuantizer(2, scales[:, None]), of_weight=True) == (-4, -2, 0, 2)
    assert levels_of(UniformQuantizer(2, scales)) == (-4, -2, 0, 2)


def test_of_several_zero_points_that_of_the_median_scale_counts() -> None:
    scales, zeros = torch.tensor([[1.0], [4.0], [2.0]]), torch.tensor([[1], [1], [0]], dtype=torch.int32)
    assert levels_of(UniformQuantizer(2, scales, zeros), of_weight=True) == (0, 2, 4, 6)


def test_rows_are_not_all_asked_for_all_values() -> None:
    seen: list[int] = []
    quantizer = UniformQuantizer(4, torch.rand(4096, 1) + 0.5)
    quantizer.register_forward_pre_hook(lambda module, given: seen.append(given[0].numel()))
    assert len(levels_of(quantizer, of_weight=True)) == 16
    assert max(seen) < 10 * 4096


def test_levels_of_the_other_kinds() -> None:
    assert levels_of(CodebookQuantizer(2, 0.5, 100, [90, 100, 101, 120])) == (-5, 0, 0.5, 10)
    assert levels_of(ShiftedRegionsQuantizer(4, 1.0, 0, 2)) == (-3, -2, -1, 0, 1, 2, 3, 4, 8, 12, 16, 20, 24, 28)
    assert levels_of(RowLogQuantizer(2, 1.0)) == pytest.approx((0, 64 / 255, 128 / 255, 1), abs=1e-6)
    assert max(levels_of(Log2Quantizer(3, 1.0))) == 1
