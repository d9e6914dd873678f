"""Bytes stand for a quantizer's values, and digits add up to its levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxquant.runtime.integer.lowered import (
    ToCodes,
)
from tests.lowering import needs_kernels
from tests.runtime.kernel_inputs import QUANTIZERS, code_of, level_table, values

pytestmark = needs_kernels


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bytes_stand_for_the_quantizers_values(name: str, instructions: str) -> None:
    quantizer, code = QUANTIZERS[name], code_of(name)
    x = torch.cat([values(name, (40, 97)).flatten(), torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-30])])
    codes = ToCodes(code)(x)
    found = torch.from_numpy(level_table(code)[codes.numpy()]).double() * code.unit
    torch.testing.assert_close(found, quantizer(x).double(), rtol=1e-6, atol=0)
    assert len(codes.unique()) <= 2**quantizer.bits


@pytest.mark.parametrize("name", QUANTIZERS)
def test_digits_add_up_to_the_levels(name: str) -> None:
    code = code_of(name)
    spec = code.levels_spec()
    if spec.identity:
        table = np.arange(256)
    else:
        digits = np.array([[spec.digit[i][byte] for byte in range(256)] for i in range(spec.count)], np.int64)
        table = (digits * 256 ** np.arange(spec.count)[:, None]).sum(0)
    assert np.array_equal(table - spec.zero, level_table(code))
