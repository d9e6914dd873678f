"""Tables from sums to bytes: the function and the quantizer after it, at any number of steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.byte_table import BITS, byte_table
from fxquant.runtime.integer.lowered import (
    Epilogue,
    IntegerLinear,
    ToCodes,
)
from fxquant.runtime.native import library
from tests.lowering import needs_kernels
from tests.runtime.kernel_inputs import code_of, linear, values

pytestmark = needs_kernels


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize(
    "output", ["symmetric 3", "opt-m 4, far", "opt-m 2", "asymmetric 5", "asymmetric 8", "opt-m 8"]
)
def test_tables_are_the_function_and_the_quantizer(output: str, rows: int, instructions: str) -> None:
    code, module = code_of("symmetric 8"), linear(75, 50, 4)
    codes = ToCodes(code)(values("symmetric 8", (rows, 50)))
    fine = UniformQuantizer(BITS, 4e-4, 9000)
    table = byte_table(fine, nn.GELU(), code_of(output))
    if output == "opt-m 8":
        assert table is None  # its levels are too close to each other
        return
    assert table is not None
    found = IntegerLinear(module, code, Epilogue(library.TABLE_CODES, table=table))(codes)
    expected = ToCodes(code_of(output))(functional.gelu(fine(IntegerLinear(module, code)(codes))))
    # The scale is part of the layer's own: a number halfway between two entries may fall on the other side.
    assert (found != expected).float().mean() < 2e-3


def test_a_table_of_any_steps_is_exact(instructions: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for steps in range(1, library.MAX_STEPS + 1):
        expected = torch.zeros(64, 256, dtype=torch.uint8)
        for row in expected:
            for place in torch.randint(0, 256, (steps,), generator=generator):
                row[place:] = torch.randint(0, 256, (), generator=generator)

        class Given(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return expected.flatten()[x.long()].float()  # noqa: B023

        bytes_as_they_are = ByteCode(library.UNIFORM, 1.0, 0, 0, 255, 8, unit=1.0)
        table = byte_table(UniformQuantizer(BITS, 1.0, 0), Given(), bytes_as_they_are)
        assert table is not None
        module = linear(1 << BITS, 1, 2, bias=False)
        assert module.weight_codes is not None
        module.weight_codes.fill_(0)
        module.bias = torch.arange(1 << BITS).float()
        module.bias[0], module.bias[-1] = -1e30, 1e30  # what is out of range takes the nearest entry
        layer = IntegerLinear(module, code_of("symmetric 8"), Epilogue(library.TABLE_CODES, table=table))
        assert torch.equal(layer(torch.zeros(1, 1, dtype=torch.uint8))[0], expected.flatten())
