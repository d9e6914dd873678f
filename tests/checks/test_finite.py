"""Whether numbers are finite is told as `torch.isfinite` tells it."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.checks.finite import is_finite

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, 0.0])
def test_one_number_among_many_decides(value: float, dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, 33).to(dtype).reshape(3, 11)
    assert is_finite(values)
    values[1, 7] = value
    assert is_finite(values.T) == bool(torch.isfinite(values).all())


def test_what_holds_no_float_number_is_finite() -> None:
    for values in (torch.zeros(0), torch.ones(3, dtype=torch.bool), torch.arange(4)):
        assert is_finite(values)


@pytest.mark.parametrize("value", [complex(math.nan, 0), complex(0, math.inf), complex(1, -1)])
def test_both_parts_of_a_complex_number_decide(value: complex) -> None:
    values = torch.zeros(2, 3, dtype=torch.complex64)
    values[1, 1] = value
    for each in (values, values.conj()):
        assert is_finite(each) == bool(torch.isfinite(each).all())
