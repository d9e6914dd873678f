from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.quantizers.families import FAMILIES
from fxquant.quantizers.family import Proposals, Statistics
from fxquant.quantizers.search import search_activation
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer
from fxquant.quantizers.statistics.outlier_channels import outlier_factors
from tests.quantizers.plain_versions import squared_error, statistics_of, to_bf16

WIDTHS = range(2, 9)
OF_VALUES = sorted(name for name, family in FAMILIES.items() if not family.of_rows)


def samples(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 300, generator=generator) * 2
    x = {
        "gelu": torch.nn.functional.gelu(x),
        "softmax": (3 * x).softmax(1),
        "positive": x.abs() + 1,
        "negative": -x.abs() - 1,
        "zero": torch.zeros(4, 300),
        "tiny": x * 1e-20,
        "huge": x * 1e20,
        "outlier": torch.where(torch.arange(300) == 7, 1000.0, x),
    }[kind]
    return to_bf16(x)


KINDS = ["gelu", "softmax", "positive", "negative", "zero", "tiny", "huge", "outlier"]


def some(proposals: Proposals) -> list[int]:
    count = len(proposals.levels)
    return sorted({0, 1 % count, count // 4, count // 2, (3 * count) // 4, count - 1})


@pytest.mark.parametrize("family", OF_VALUES)
@pytest.mark.parametrize("kind", KINDS)
def test_quantizers_take_the_level_their_table_says(family: str, kind: str) -> None:
    statistics = statistics_of(samples(kind))
    for bits in WIDTHS:
        proposals = FAMILIES[family].propose(statistics, bits)
        levels, thresholds = proposals.levels, proposals.thresholds
        assert levels.shape == (len(levels), thresholds.shape[1] + 1)
        assert np.isfinite(levels).all()
        assert (np.diff(levels, axis=1) >= 0).all()
        assert (np.diff(thresholds, axis=1) >= 0).all()
        for index in some(proposals):
            quantizer = proposals.build(index)
            row, cuts = levels[index], thresholds[index]
            # Inside every interval between thresholds, and beyond both ends.
            reach = max(abs(row[0]), abs(row[-1]))
            edges = np.concatenate([[row[0] - reach], cuts, [row[-1] + reach]])
            wide = np.flatnonzero(np.diff(edges) > 1e-5 * reach)
            inside = np.concatenate([edges[wide] * (1 - t) + edges[wide + 1] * t for t in (0.01, 0.5, 0.99)])
            expected = np.tile(row[wide], 3)
            found = quantizer(torch.tensor(inside, dtype=torch.float32))
            assert found.numpy() == pytest.approx(expected, rel=2e-6, abs=2e-6 * reach), (bits, index)
            codes = quantizer.quantize(torch.tensor(inside, dtype=torch.float32))
            assert len(codes.unique()) <= 2**bits
            assert torch.equal(quantizer.dequantize(codes), found)


@pytest.mark.parametrize("family", OF_VALUES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_search_is_never_worse_than_a_plain_loop_over_the_candidates(family: str, kind: str, weighted: bool) -> None:
    x = samples(kind)
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) if weighted else None
    statistics = statistics_of(x, weight)
    (candidate,) = search_activation(statistics, FAMILIES[family], (3,), images=len(x), weighted=weighted)
    proposals = FAMILIES[family].propose(statistics, 3)
    step = max(1, len(proposals.levels) // 60)
    tried = [squared_error(x, proposals.build(i)(x), weight) for i in range(0, len(proposals.levels), step)]
    found = squared_error(x, candidate.quantizer(x), weight)
    signal = squared_error(x, torch.zeros_like(x), weight)
    assert found <= min(tried) * (1 + 1e-5) + 1e-9 * signal
    assert candidate.loss == pytest.approx(0.5 * found / len(x), rel=1e-4, abs=1e-9 * signal)
    assert candidate.signal == pytest.approx(squared_error(x, torch.zeros_like(x)))
    assert candidate.noise == pytest.approx(squared_error(x, candidate.quantizer(x)), rel=1e-4, abs=1e-9 * signal)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_bits_are_not_worse(family: str) -> None:
    x = samples("softmax" if "gelu" not in family and ("log" in family or "softmax" in family) else "gelu")
    found = search_activation(statistics_of(x), FAMILIES[family], WIDTHS, images=4, weighted=False)
    losses = [candidate.loss for candidate in found]
    # Tables of powers stop improving where their coarse end decides; grids of fewer bases are a little worse.
    slack = 1.06 if "log" in family else 1.0
    assert all(wide <= slack * narrow for narrow, wide in itertools.pairwise(losses))
    assert [candidate.bits for candidate in found] == list(WIDTHS)


def test_search_with_weights_that_are_all_zero_falls_back_to_the_plain_error() -> None:
    x = samples("gelu")
    statistics = statistics_of(x, torch.zeros_like(x))
    for family in FAMILIES.values():
        (found,) = search_activation(statistics, family, (4,), images=4, weighted=True)
        (plain,) = search_activation(statistics, family, (4,), images=4, weighted=False)
        assert found.noise == plain.noise
        assert found.loss == 0


def test_asymmetric_zero_point_is_exact_and_reaches_one_sided_ranges() -> None:
    for kind in ("positive", "negative"):
        x = samples(kind)
        (found,) = search_activation(statistics_of(x), FAMILIES["asymmetric"], (8,), images=4, weighted=False)
        assert float((found.quantizer(x) - x).abs().max()) < float(x.abs().max()) / 100
        assert float(found.quantizer(torch.zeros(1))) == 0


class TestPaperExamples:
    """MPTQ-ViT, section 4.3, 4 bits."""

    def test_opt_m(self) -> None:
        quantizer = ShiftedRegionsQuantizer(4, 0.0515, shift_small=3, shift_large=5)
        x = torch.linspace(-0.17, 13, 200001)
        levels = quantizer(x).unique()
        # The paper prints 11.5458 for 7 s2 with s0 about 0.0515, so s0 = 11.5458 / 7 / 32.
        assert float(levels.max()) == pytest.approx(11.5458, rel=1e-3)
        assert pytest.approx(0.4124, abs=5e-4) == 0.0515 * 2**3
        assert pytest.approx(1.6494, abs=2e-3) == 0.0515 * 2**5
        assert len(levels[levels <= 0]) == 4, "negative bins, zero included"
        small = levels[(levels > 0) & (levels < 1.6)]
        assert small.tolist() == pytest.approx([0.412, 0.824, 1.236])
        large = levels[levels > 1.6]
        assert large.tolist() == pytest.approx([1.648 * k for k in range(1, 8)])

    def test_tsptq(self) -> None:
        quantizer = ShiftedRegionsQuantizer(4, 0.0693, shift_small=0, shift_large=3)
        levels = quantizer(torch.linspace(-0.17, 13, 200001)).unique()
        assert float(levels.max()) == pytest.approx(3.8808)
        assert len(levels[levels <= 0]) == 3, "negative bins, zero included"
        small = levels[(levels >= 0) & (levels < 0.5)]
        assert small.tolist() == pytest.approx([0, 0.0693, 0.1386, 0.2079]), "4 small positive bins"
        large = levels[levels > 0.5]
        assert large.tolist() == pytest.approx([0.5544 * k for k in range(1, 8)])

    def test_boundary_at_six_bits_follows_from_the_code(self) -> None:
        quantizer = ShiftedRegionsQuantizer(6, 1.0, shift_small=2, shift_large=5)
        assert quantizer.small_max * 4 == 60
        assert quantizer(torch.tensor([61.9, 62.1])).tolist() == [60, 64]


def test_opt_m_takes_the_large_shift_from_the_range() -> None:
    """Equation 7, by hand."""
    x = samples("gelu")
    statistics = statistics_of(x)
    for bits in range(3, 9):
        upper = statistics.moments.quantile(0.9995) / (2 ** (bits - 1) - 1)
        lower = -statistics.mean_image_minimum / (2 ** (bits - 2) - 1)
        expected = max(1, round(math.log2(upper / lower)))
        proposals = FAMILIES["opt-m"].propose(statistics, bits)
        quantizer = proposals.build(0)
        assert isinstance(quantizer, ShiftedRegionsQuantizer)
        assert quantizer.shift_large == expected
        assert len(proposals.levels) == 100 * expected, "every m0 < m1 with 100 base scales"


class TestOutlierFactors:
    def test_groups_get_powers_of_two(self) -> None:
        magnitude = torch.tensor([1.0, 1.1, 0.9, 8.2, 7.9, 32.0, 1.05, 7.7])
        factor = outlier_factors(magnitude)
        assert factor.tolist() == [1, 1, 1, 8, 8, 32, 1, 8]

    @pytest.mark.parametrize("magnitude", [torch.zeros(8), torch.full((8,), 3.0), torch.tensor([5.0])])
    def test_nothing_to_group(self, magnitude: Tensor) -> None:
        assert torch.equal(outlier_factors(magnitude), torch.ones_like(magnitude))

    def test_one_scale_per_channel_covers_outliers(self) -> None:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(4, 50, 16, generator=generator)
        x[..., 3] *= 64
        factor = outlier_factors(x.abs().amax((0, 1)))
        scaled = statistics_of(x / factor)
        moments = scaled.moments
        statistics = Statistics(moments, scaled.minimum, scaled.maximum, scaled.mean_image_minimum, factor)
        (two_scaled,) = search_activation(statistics, FAMILIES["o-2sf"], (4,), 4, weighted=False)
        (plain,) = search_activation(statistics_of(x), FAMILIES["symmetric"], (4,), 4, weighted=False)
        ordinary = [c for c in range(16) if c != 3]
        quantized = two_scaled.quantizer(x)
        assert squared_error(x[..., ordinary], quantized[..., ordinary]) < 0.1 * squared_error(
            x[..., ordinary], plain.quantizer(x)[..., ordinary]
        )
