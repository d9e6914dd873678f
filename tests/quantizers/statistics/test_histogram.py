from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.quantizers.families import FAMILIES
from fxquant.quantizers.family import midpoints
from fxquant.quantizers.statistics.histogram import Bfloat16Histogram
from tests.quantizers.plain_versions import by_table, squared_error, statistics_of, to_bf16

pytestmark = pytest.mark.quick

BFLOAT16_STEP = 2.0**-8


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.of_rows])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_equal_fake_quantization_with_the_quantizer_built(family: str, bits: int) -> None:
    torch.manual_seed(bits)
    x = to_bf16(torch.nn.functional.gelu(torch.randn(4, 500)))
    if family in ("log2", "log-sqrt2", "twin-softmax", "adalog-softmax", "adalog-zero-softmax"):
        x = x.abs()
    weight = torch.rand(4, 500)
    statistics = statistics_of(x, weight)
    proposals = FAMILIES[family].propose(statistics, bits)
    plain, weighted = statistics.moments.errors(proposals.levels, proposals.thresholds)
    count = len(proposals.levels)
    for index in {0, count // 3, (4 * count) // 7, count - 1}:
        quantized = proposals.build(index)(x)
        assert plain[index] == pytest.approx(squared_error(x, quantized), rel=1e-5, abs=1e-9)
        assert weighted[index] == pytest.approx(squared_error(x, quantized, weight), rel=1e-5, abs=1e-9)


def test_a_coherent_error_costs_its_square() -> None:
    torch.manual_seed(1)
    x, weight = to_bf16(torch.rand(4, 500)), torch.rand(4, 500)
    moments = statistics_of(x, weight).moments
    levels = np.array([[0.0, 0.3, 1.0], [0.1, 0.5, 0.9]])
    _, incoherent = moments.errors(levels, midpoints(levels))
    _, coherent = moments.errors(levels, midpoints(levels), coherence=3.0)
    for row, before, after in zip(levels, incoherent, coherent, strict=True):
        error = weight.double().numpy() * (by_table(x, row, midpoints(row[None])[0]) - x.double().numpy())
        assert after - before == pytest.approx(3 * error.sum() ** 2 / float(weight.double().sum()), rel=1e-4)


def test_errors_of_values_sharing_a_bucket_with_a_threshold_are_off_by_the_bucket_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4000)
    statistics = statistics_of(x)
    levels = np.linspace(0.1, 1, 10)[:, None] * np.arange(-8.0, 8.0)
    plain, weighted = statistics.moments.errors(levels, midpoints(levels))
    for row, found in zip(levels, plain, strict=True):
        exact = float(((by_table(x, row, midpoints(row[None])[0]) - x.double().numpy()) ** 2).sum())
        assert found == pytest.approx(exact, rel=2 * BFLOAT16_STEP)
    assert np.array_equal(plain, weighted), "no weights were given"


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    levels=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=9, unique=True),
)
def test_errors_are_exact_for_any_values_and_levels(values: list[float], levels: list[float]) -> None:
    x = to_bf16(torch.tensor(values))
    table = np.array([sorted(levels)])
    thresholds = midpoints(table)
    histogram = Bfloat16Histogram()
    histogram.update(x)
    plain, _ = histogram.finish().errors(table, thresholds)
    exact = float(((by_table(x, table[0], thresholds[0]) - x.double().numpy()) ** 2).sum())
    assert plain[0] == pytest.approx(exact, rel=1e-6, abs=1e-6 * max(1.0, float(x.double().square().sum())))


def test_streaming_equals_one_update() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(6, 100), torch.rand(6, 100)
    whole, streamed = Bfloat16Histogram(), Bfloat16Histogram()
    whole.update(x, weight)
    for index in range(6):
        streamed.update(x[index], weight[index])
    assert np.allclose(whole.finish().moments, streamed.finish().moments, rtol=1e-12)
    assert whole.finish().count == 600
    assert whole.finish().signal == pytest.approx(float(x.double().square().sum()))


@pytest.mark.parametrize("has_mass", [False, True])
def test_what_is_added_in_chunks_is_added_bit_for_bit(has_mass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 1000), torch.rand(3, 1000)
    found = []
    for chunk in (7, 1000, 10_000):
        monkeypatch.setattr("fxquant.quantizers.statistics.histogram.CHUNK", chunk)
        histogram = Bfloat16Histogram()
        histogram.update(x, weight, x.square() if has_mass else None)
        found.append(histogram.state()["moments"])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    assert float(found[0][0].sum()) == pytest.approx(float(x.double().square().sum()) if has_mass else 3000)


def test_memory_is_that_of_the_buckets_that_hold_values() -> None:
    histogram = Bfloat16Histogram()
    for value in (1.0, 2.0, 1.0):
        histogram.update(torch.full((5,), value), torch.ones(5))
    held = [tensor for tensor in vars(histogram).values() if isinstance(tensor, torch.Tensor)]
    assert sum(tensor.numel() for tensor in held) == 2 * 7
    assert histogram.finish().moments[[0, 3]].tolist() == [[10, 5], [10, 5]]


def test_a_state_goes_on_where_it_was_kept() -> None:
    whole, kept, resumed = Bfloat16Histogram(), Bfloat16Histogram(), Bfloat16Histogram()
    x, weight = torch.randn(2, 50, generator=torch.Generator().manual_seed(3)), torch.ones(50)
    whole.update(x[0], weight)
    kept.update(x[0], weight)
    resumed.restore(kept.state())
    for histogram in (whole, resumed):
        histogram.update(x[1], weight)
    assert np.array_equal(whole.finish().moments, resumed.finish().moments)


def test_two_are_merged_into_one() -> None:
    """Whatever buckets each has; values are whole, so that sums are exact."""
    draw = torch.Generator().manual_seed(4)
    x = torch.randint(-9, 9, (2, 60), generator=draw).float() * torch.tensor([[1.0], [4.0]])
    whole, first, second = Bfloat16Histogram(), Bfloat16Histogram(), Bfloat16Histogram()
    for histogram, part in ((whole, x[0]), (whole, x[1]), (first, x[0]), (second, x[1])):
        histogram.update(part, part.abs())
    first.merge(second.state())
    assert first.weighted
    assert np.array_equal(first.finish().moments, whole.finish().moments)


def test_values_are_ascending_and_signed_zeros_do_not_disturb() -> None:
    histogram = Bfloat16Histogram()
    histogram.update(torch.tensor([0.0, -0.0, 3.0, -5.0, 1e-30, -1e-30]))
    values = histogram.finish().values
    assert np.all(np.diff(values) >= 0)
    assert values[0] == -5
    assert values[-1] == 3


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9995, 1.0])
def test_quantile(fraction: float) -> None:
    x = to_bf16(torch.randn(1, 4000, generator=torch.Generator().manual_seed(2)))
    expected = np.quantile(x.numpy(), fraction, method="inverted_cdf")
    assert statistics_of(x).moments.quantile(fraction) == expected


@pytest.mark.parametrize("value", [0.0, 1.5, -2.25])
def test_constant_tensors(value: float) -> None:
    x = torch.full((2, 10), value)
    moments = statistics_of(x).moments
    levels = np.array([[-1.0, 0.0, 1.0]])
    nearest = np.abs(levels[0] - value).min()
    assert moments.errors(levels, midpoints(levels))[0][0] == pytest.approx(20 * nearest**2)
    assert moments.quantile(0.9995) == value


def test_no_values_cost_nothing() -> None:
    histogram = Bfloat16Histogram()
    histogram.update(torch.empty(0, 5))
    moments = histogram.finish()
    levels = np.array([[-1.0, 0.0, 1.0]])
    assert moments.count == 0
    assert moments.errors(levels, midpoints(levels))[0][0] == 0
