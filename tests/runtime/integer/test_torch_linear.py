"""torch's own products of bytes against the kernels'."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime import simulated
from fxquant.runtime.integer import lowered
from fxquant.runtime.integer.byte_codes import byte_code
from fxquant.runtime.integer.lowered import ToCodes
from fxquant.runtime.integer.torch_linear import IntMmLinear
from tests.lowering import needs_kernels


@needs_kernels
@pytest.mark.parametrize(("inner", "out", "rows"), [(7, 5, 1), (32, 8, 17), (30, 24, 40)])
def test_torchs_int8_products_equal_the_kernels(inner: int, out: int, rows: int) -> None:
    code = byte_code(UniformQuantizer(6, 0.1, zero_point=20))
    assert code is not None
    layer = nn.Linear(inner, out)
    grid = UniformQuantizer(4, torch.rand(out, 1) + 0.1)
    source = simulated.QuantizedLinear(layer.weight, layer.bias, grid, None)
    x = torch.randn(2, rows, inner) * 3
    expected = lowered.IntegerLinear(source, code)(ToCodes(code)(x))
    torch.testing.assert_close(IntMmLinear(source, code)(x), expected, rtol=1e-6, atol=1e-6)
