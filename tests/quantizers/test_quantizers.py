from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import ArtefactError
from fxquant.quantizers.adalog import AdaLogQuantizer, AdaLogZeroQuantizer, adalog_levels
from fxquant.quantizers.families import FAMILIES
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.log_sqrt2 import LogSqrt2Quantizer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer
from fxquant.quantizers.twin_uniform import TwinUniformQuantizer
from fxquant.quantizers.uniform import UniformQuantizer
from tests.quantizers.plain_versions import statistics_of

pytestmark = pytest.mark.quick

QUANTIZERS = {
    "symmetric": UniformQuantizer(4, 0.13),
    "per channel": UniformQuantizer(5, torch.rand(6, 1) + 0.1),
    "asymmetric": UniformQuantizer(3, 0.21, 5),
    "asymmetric per channel": UniformQuantizer(3, torch.rand(40) + 0.1, torch.arange(40, dtype=torch.int32) % 8),
    "opt-m": ShiftedRegionsQuantizer(4, 0.05, 3, 5),
    "twin-softmax": ShiftedRegionsQuantizer(4, 0.01, 0, 4, negative=False),
    "log2": Log2Quantizer(4, 0.9),
    "log-sqrt2": LogSqrt2Quantizer(4, 0.9),
    "twin-uniform": TwinUniformQuantizer(4, 0.3, 0.07, True),
    "adalog": AdaLogQuantizer(4, 0.9, 30, 0.17),
    "adalog-zero": AdaLogZeroQuantizer(4, 0.9, 30, 0.17),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
class TestEveryKind:
    def test_settings_and_state_dict_rebuild_it(self, quantizer: Quantizer, x: Tensor) -> None:
        rebuilt = Quantizer.from_settings(quantizer.settings())
        rebuilt.load_state_dict(quantizer.state_dict())
        assert type(rebuilt) is type(quantizer)
        assert torch.equal(rebuilt(x), quantizer(x))
        assert torch.equal(rebuilt.quantize(x), quantizer.quantize(x))
        assert rebuilt.settings() == quantizer.settings()

    def test_forward_is_quantize_then_dequantize(self, quantizer: Quantizer, x: Tensor) -> None:
        codes = quantizer.quantize(x)
        assert codes.dtype == torch.int32
        assert torch.equal(quantizer(x), quantizer.dequantize(codes))
        assert len(codes.unique()) <= 2**quantizer.bits

    def test_levels_stay_where_they_are(self, quantizer: Quantizer, x: Tensor) -> None:
        once = quantizer(x)
        assert torch.allclose(quantizer(once), once, rtol=1e-6)

    def test_keeps_dtype_and_shape(self, quantizer: Quantizer, x: Tensor) -> None:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            quantized = quantizer(x.to(dtype))
            assert quantized.dtype == dtype
            assert quantized.shape == x.shape

    def test_empty_input(self, quantizer: Quantizer, x: Tensor) -> None:
        assert quantizer(x[:, :0] if quantizer.settings().get("shape") != [40] else x[:0]).numel() == 0

    def test_copies_are_independent(self, quantizer: Quantizer, x: Tensor) -> None:
        duplicate = copy.deepcopy(quantizer)
        duplicate.scale *= 2
        assert not torch.equal(duplicate(x), quantizer(x))


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(2, 8),
    scale=st.floats(1e-20, 1e10),
    zero=st.none() | st.integers(0, 255),
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=10),
)
def test_fused_uniform_forward_equals_codes_and_back(
    bits: int, scale: float, zero: int | None, values: list[float]
) -> None:
    quantizer = UniformQuantizer(bits, scale, None if zero is None else zero % 2**bits)
    x = torch.tensor(values)
    assert torch.equal(quantizer(x), quantizer.dequantize(quantizer.quantize(x)))


FIXED = {"adalog-gelu", "adalog-zero-gelu", "twin-uniform-gelu", "twin-uniform-softmax", "log-int-softmax"}
"""Families whose scale has a floor, or is no choice."""


@pytest.mark.parametrize(
    "family", [name for name, family in FAMILIES.items() if name not in FIXED and not family.of_rows]
)
def test_values_far_outside_an_all_zero_calibration_are_clipped_to_their_own_side(family: str) -> None:
    quantizer = FAMILIES[family].propose(statistics_of(torch.zeros(2, 8)), 4).build(0)
    found = quantizer(torch.tensor([1e30, 3e4, 0.0, -3e4, -1e30]))
    assert (found[:2] >= 0).all()
    assert found[2] == 0 or family == "adalog-softmax", "AdaLog has no zero"
    assert (found[3:] <= max(found[2], 0)).all()
    assert (found.abs() < 1e-10).all()


@pytest.mark.parametrize(
    "broken",
    [
        {"kind": "unheard of"},
        {},
        {"kind": "uniform", "bits": 4},
        {"kind": "uniform", "bits": "four", "symmetric": True, "shape": []},
        {"kind": "shifted-regions", "bits": 4, "shift_small": 6, "shift_large": 2, "negative": True},
        {"kind": "shifted-regions", "bits": 4, "shift_small": 0, "shift_large": 99, "negative": True},
        {"kind": "log2"},
        {"kind": "log2", "bits": 99},
        {"kind": "uniform", "bits": 0, "symmetric": True, "shape": []},
    ],
)
def test_settings_that_do_not_fit_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ArtefactError):
        Quantizer.from_settings(broken)


class TestAdaLog:
    @given(
        bits=st.integers(2, 8), base=st.integers(10, 138), scale=st.floats(0.05, 20), offset=st.sampled_from([0, 0.17])
    )
    def test_levels_are_integers_times_powers_of_two(self, bits: int, base: int, scale: float, offset: float) -> None:
        quantizer = AdaLogQuantizer(bits, scale, base, offset)
        whole = 4 * 2 ** (bits - 1) - 2
        for k, level in enumerate(reversed(adalog_levels(bits, base).tolist())):
            mantissa = level * 2 ** (k * base // 37) * whole
            assert mantissa == pytest.approx(round(2 ** (-(k * base % 37) / 37) * whole), rel=1e-4)
        x = torch.linspace(-1, 25, 999)
        codes = quantizer.quantize(x)
        assert 0 <= int(codes.min()) <= int(codes.max()) < 2**bits
        table = quantizer.levels()
        nearest = (x[:, None] - table).abs().amin(1)
        assert torch.allclose((quantizer(x) - x).abs(), nearest, atol=1e-6)

    def test_base_37_is_log2(self) -> None:
        assert AdaLogQuantizer(4, 1.0, 37).relative_levels().tolist() == [2.0**-k for k in range(15, -1, -1)]

    @given(bits=st.integers(2, 8), base=st.integers(10, 138), offset=st.sampled_from([0, 0.17]))
    def test_a_zero_takes_the_place_of_the_smallest_level(self, bits: int, base: int, offset: float) -> None:
        without = AdaLogQuantizer(bits, 1.5, base, offset).levels()
        found = AdaLogZeroQuantizer(bits, 1.5, base, offset).levels()
        assert float(found[0]) == pytest.approx(-offset)
        assert torch.equal(found[1:], without[1:])

    def test_bases_outside_the_range_are_refused(self) -> None:
        with pytest.raises(ValueError, match="from 10 to 138, not 139"):
            AdaLogQuantizer(4, 1.0, 139)
        with pytest.raises(ArtefactError, match="do not fit"):
            Quantizer.from_settings({"kind": "adalog", "bits": 4, "base": 5, "offset": 0.0})


def test_log_sqrt2_has_zero_and_half_powers() -> None:
    levels = LogSqrt2Quantizer(3, 2.0).levels().tolist()
    assert levels == pytest.approx([0.0, *(2 * 2 ** (-k / 2) for k in range(6, -1, -1))])


@pytest.mark.parametrize("quantizer", [AdaLogQuantizer(4, 0.7, 51, 0.17), LogSqrt2Quantizer(5, 1.3)])
def test_tables_are_rebuilt_from_their_settings(quantizer: Quantizer) -> None:
    again = Quantizer.from_settings(quantizer.settings())
    again.load_state_dict(quantizer.state_dict())
    x = torch.randn(500)
    assert torch.equal(again(x), quantizer(x))
    assert torch.equal(quantizer.dequantize(quantizer.quantize(x)), quantizer(x))
