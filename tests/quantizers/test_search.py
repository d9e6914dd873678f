from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.quantizers.search import COARSE_RATIOS, search_weight
from fxquant.quantizers.uniform import UniformQuantizer

pytestmark = pytest.mark.quick


def rows_and_weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator)
    rows = torch.randn(300, 64, generator=generator) @ mixing
    return rows, torch.randn(20, 64, generator=generator)


def costs(weight: Tensor, quantized: Tensor, rows: Tensor | None) -> Tensor:
    """||(Q(W) - W) X||^2 of each output channel on real rows X; the weight's own error without rows."""
    error = (quantized - weight).double()
    return (error if rows is None else error @ rows.double().T).square().sum(1)


@pytest.mark.parametrize("with_rows", [True, False])
def test_weight_scales_against_a_plain_loop_over_real_rows(with_rows: bool) -> None:
    samples, weight = rows_and_weight()
    rows = samples if with_rows else None
    covering = weight.abs().amax(1, keepdim=True)
    for found in search_weight(weight, (2, 3, 4, 6), 10, samples.T @ samples if with_rows else None):

        def tried(ratios: list[float], bits: int = found.bits) -> Tensor:
            scales = [covering * (ratio / (2 ** (bits - 1) - 1)) for ratio in ratios]
            return torch.stack([costs(weight, UniformQuantizer(bits, s)(weight), rows) for s in scales]).amin(0)

        reached = costs(weight, found.quantizer(weight), rows)
        assert (reached <= tried([1.0, *COARSE_RATIOS]) * (1 + 1e-4)).all()
        assert float(reached.sum()) <= 1.25 * float(tried(list(np.linspace(0.2, 1.2, 201))).sum())
        assert found.loss == pytest.approx(0.5 * float(reached.sum()) / 10, rel=1e-3)
        assert found.noise == pytest.approx(float(costs(weight, found.quantizer(weight), None).sum()), rel=1e-5)
        assert found.signal == pytest.approx(float(weight.double().square().sum()))


def test_one_scale_for_a_tensor_is_the_best_of_the_papers_hundred() -> None:
    """MPTQ-ViT, section 4: (k / 100) 1.2 max|W| / 2^(b-1), the best by the loss of all rows together."""
    samples, weight = rows_and_weight()
    importance = torch.linspace(0.5, 2.0, len(weight))
    for found in search_weight(weight, (2, 3, 4, 6, 8), 10, samples.T @ samples, importance, per_tensor=True):
        steps = torch.arange(1, 101) / 100 * 1.2 * weight.abs().max() / 2 ** (found.bits - 1)
        tried = [(costs(weight, UniformQuantizer(found.bits, s)(weight), samples) * importance).sum() for s in steps]
        assert found.quantizer.scale.shape == (1, 1)
        assert float((found.quantizer.scale / steps - 1).abs().min()) < 1e-5
        reached = (costs(weight, found.quantizer(weight), samples) * importance).sum()
        assert float(reached) <= 1.02 * float(min(tried))
        assert found.loss == pytest.approx(0.5 * float(reached) / 10, rel=1e-3)
    (asymmetric,) = search_weight(weight, (3,), 10, samples.T @ samples, asymmetric=True, per_tensor=True)
    assert asymmetric.quantizer.zero_point.shape == (1, 1)
    (covering,) = search_weight(weight, (4,), 10, torch.zeros(64, 64), per_tensor=True)
    assert float(covering.quantizer.scale) == pytest.approx(float(weight.abs().max()) / 7)


def test_channel_weights_scale_the_loss_and_leave_the_choice() -> None:
    rows, weight = rows_and_weight()
    gram = rows.T @ rows
    (plain,) = search_weight(weight, (4,), 10, gram)
    (doubled,) = search_weight(weight, (4,), 10, gram, torch.full((20,), 2.0))
    assert torch.equal(plain.quantizer(weight), doubled.quantizer(weight))
    assert doubled.loss == pytest.approx(2 * plain.loss)


def test_a_weight_the_loss_does_not_depend_on_keeps_a_scale_that_covers_it() -> None:
    _, weight = rows_and_weight()
    (found,) = search_weight(weight, (4,), 10, torch.zeros(64, 64), torch.ones(20))
    (covering,) = search_weight(weight, (4,), 10, search=False)
    assert torch.equal(found.quantizer(weight), covering.quantizer(weight))
    assert found.loss == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    rows, weight = rows_and_weight()
    (found,) = search_weight(weight.to(dtype), (6,), 10, (rows.T @ rows).to(dtype), torch.ones(20, dtype=dtype))
    assert found.noise < 1e-2 * found.signal


def test_min_max_ratio_covers_every_channel() -> None:
    _, weight = rows_and_weight()
    (found,) = search_weight(weight, (5,), 1, search=False)
    assert torch.allclose(found.quantizer.scale, weight.abs().amax(1, keepdim=True) / 15)


def test_a_channel_of_zeros_stays_zero() -> None:
    rows, weight = rows_and_weight()
    weight[2] = 0
    (found,) = search_weight(weight, (4,), 1, rows.T @ rows)
    assert not found.quantizer(weight)[2].any()
    assert bool(torch.isfinite(found.quantizer(weight)).all())


class TestZeroPoints:
    def test_against_symmetric_ranges_on_weights_off_centre(self) -> None:
        rows, weight = rows_and_weight()
        weight, gram = weight + weight.std(), rows.T @ rows
        for bits in (2, 3, 4):
            (symmetric,) = search_weight(weight, (bits,), 10, gram)
            (found,) = search_weight(weight, (bits,), 10, gram, asymmetric=True)
            reached = costs(weight, found.quantizer(weight), rows)
            assert found.loss < 0.75 * symmetric.loss
            assert found.loss == pytest.approx(0.5 * float(reached.sum()) / 10, rel=1e-3)
            assert found.quantizer.zero_point is not None
            assert 0 <= int(found.quantizer.zero_point.min()) <= int(found.quantizer.zero_point.max()) < 2**bits

    def test_rows_of_one_sign_spend_no_code_on_the_other(self) -> None:
        _, weight = rows_and_weight()
        (found,) = search_weight(torch.stack([weight[0].abs(), -weight[0].abs()]), (4,), 1, asymmetric=True)
        assert found.quantizer.zero_point.flatten().tolist() == [0, 15]

    def test_codes_fit_eight_signed_bits(self) -> None:
        _, weight = rows_and_weight()
        for found in search_weight(weight, (7, 8), 1, asymmetric=True):
            codes = found.quantizer.quantize(weight)
            assert torch.equal(codes.to(torch.int8).to(torch.int32), codes)

    def test_zeros_stay_zero(self) -> None:
        (found,) = search_weight(torch.zeros(2, 5), (4,), 1, asymmetric=True)
        assert not found.quantizer(torch.zeros(2, 5)).any()
