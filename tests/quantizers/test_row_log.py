"""Attention probabilities relative to the largest of their row."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.graph.annotation import Source
from fxquant.quantizers.families import FAMILIES, families_named
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.observers import Observer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.row_log import RowLogQuantizer
from fxquant.quantizers.search import search_activation
from tests.quantizers.plain_versions import statistics_of


def attention(keys: int = 197, rows: int = 50, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(keys)
    strengths = torch.rand(rows, 1, generator=generator) * sharpness
    return (torch.randn(rows, keys, generator=generator) * strengths).softmax(-1)


def by_hand(row: list[float], bits: int, base: float) -> list[float]:
    """One row in plain Python."""
    zero = 2**bits - 1
    levels = []
    for x in row:
        code = zero if x <= 0 else round(-float(torch.tensor(x / max(row)).double().log2()) / base)
        levels.append(0 if code >= zero else round(255 * 2 ** (-base * code)))
    return [level / sum(levels) for level in levels]


@pytest.mark.parametrize(("bits", "base"), [(2, 3.1), (3, 1.3), (4, 0.61), (8, 0.03)])
def test_equals_plain_python(bits: int, base: float) -> None:
    x = attention(17, 6)
    found = RowLogQuantizer(bits, base)(x)
    for row, expected in zip(found, x.tolist(), strict=True):
        assert row.tolist() == pytest.approx(by_hand(expected, bits, base), rel=1e-5)


@given(bits=st.integers(2, 8), keys=st.integers(1, 40), base=st.floats(0.02, 4), seed=st.integers(0, 99))
def test_rows_sum_to_one_and_keep_their_order(bits: int, keys: int, base: float, seed: int) -> None:
    x = (torch.randn(4, keys, generator=torch.Generator().manual_seed(seed)) * 3).softmax(-1)
    quantizer = RowLogQuantizer(bits, base)
    codes, values = quantizer.quantize(x), quantizer(x)
    torch.testing.assert_close(values.sum(-1), torch.ones(4))
    assert int(codes.min()) == 0
    assert int(codes.max()) <= 2**bits - 1
    order = x.argsort(-1)
    assert bool((values.gather(-1, order).diff(dim=-1) >= 0).all())
    assert torch.equal(quantizer(x * 0.37), values), "a row's own scale does not matter"
    assert torch.equal(quantizer.dequantize(codes), values)


def test_what_is_no_probability_does_no_harm() -> None:
    quantizer = RowLogQuantizer(3, 1.0)
    assert torch.equal(quantizer(torch.zeros(2, 4)), torch.zeros(2, 4))
    assert torch.isfinite(quantizer(torch.tensor([[torch.nan, 1.0], [-1.0, 2.0]]))).all()
    assert quantizer(torch.tensor([[-1.0, 2.0]])).tolist() == [[0.0, 1.0]]


def test_it_is_rebuilt_from_its_settings() -> None:
    quantizer = RowLogQuantizer(4, 0.6)
    rebuilt = Quantizer.from_settings(quantizer.settings())
    rebuilt.load_state_dict(quantizer.state_dict())
    assert torch.equal(rebuilt(attention()), quantizer(attention()))
    assert quantizer(attention().to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("keys", [49, 197, 577])
def test_products_are_closer_than_with_one_scale_at_the_same_width(keys: int) -> None:
    """The whole point: rows of all strengths, values with a mean; a bit less still is better than the others."""
    x, values = attention(keys, 400, 4.0), torch.randn(keys, 64, generator=torch.Generator().manual_seed(1)) + 0.5
    statistics = statistics_of(x)

    def error(family: str, bits: int) -> float:
        (found,) = search_activation(statistics, FAMILIES[family], (bits,), images=1, weighted=False)
        return float(((found.quantizer(x) - x) @ values).square().mean())

    others = ("log2", "twin-softmax", "adalog-softmax")
    assert error("row-log", 3) < min(error(family, 3) for family in others) / 5
    assert error("row-log", 3) < min(error(family, 4) for family in others)
    assert error("row-log", 2) < min(error(family, 3) for family in others)


@pytest.mark.parametrize(("keys", "widest"), [(4, 8), (9, 8), (16, 8), (49, 7), (197, 5)])
def test_every_bit_brings_products_closer(keys: int, widest: int) -> None:
    """Until levels of a byte are what errs: with few keys, a zero that begins at a 16th of the largest errs more."""
    x, values = attention(keys, 400, 4.0), torch.randn(keys, 64, generator=torch.Generator().manual_seed(1)) + 0.5
    statistics, errors = statistics_of(x), list[float]()
    for bits in range(2, widest + 1):
        (found,) = search_activation(statistics, FAMILIES["row-log"], (bits,), images=1, weighted=False)
        errors.append(float(((found.quantizer(x) - x) @ values).square().mean().sqrt()))
    assert all(after < 0.75 * before for before, after in itertools.pairwise(errors)), errors


def test_predicted_noise_is_that_of_levels_before_they_are_divided_by_their_sum() -> None:
    x = attention()
    observer = Observer(families_named("row-log"), Source.POST_SOFTMAX, gram=False)
    observer.update(x[None], torch.ones_like(x[None]))
    (found,) = search_activation(observer.statistics(), FAMILIES["row-log"], (3,), images=1, weighted=True)
    quantizer = found.quantizer
    assert isinstance(quantizer, RowLogQuantizer)
    undivided = quantizer.levels()[quantizer.quantize(x)] / 255 * x.amax(-1, keepdim=True)
    expected = float((undivided - x).double().square().sum())
    assert found.noise == pytest.approx(expected, rel=0.02)
    assert found.loss == pytest.approx(expected / 2, rel=0.02)
    assert found.signal == pytest.approx(float(x.double().square().sum()), rel=1e-6)


def test_levels_reach_as_far_as_all_keys_together() -> None:
    """With as many keys as there are, what the zero swallows weighs no more than the row's largest value."""
    for keys in (16, 49, 197):
        (found,) = search_activation(statistics_of(attention(keys)), FAMILIES["row-log"], (2,), 1, weighted=False)
        assert isinstance(found.quantizer, RowLogQuantizer)
        assert keys * 2 ** (-2.5 * float(found.quantizer.base)) == pytest.approx(1, rel=1e-5)


def test_one_scale_is_what_it_beats_on_flat_rows() -> None:
    """Rows of 197 nearly equal values lie below all levels that a sharp row has set."""
    flat = attention(197, 5, 0.3)
    error = (Log2Quantizer(3, 0.9)(flat) - flat).square().sum()
    assert (RowLogQuantizer(3, 1.25)(flat) - flat).square().sum() < error / 10
