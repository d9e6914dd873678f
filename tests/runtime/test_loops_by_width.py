"""On a set whose loops depend on how large weights and codes are, every loop that they choose is exact."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode, byte_code
from fxquant.runtime.integer.kernel_times import linear_ms, time_key
from fxquant.runtime.integer.lowered import IntegerLinear, IntegerMatmul
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedLinear

pytestmark = pytest.mark.skipif(library.why_absent() is not None, reason=str(library.why_absent()))

SETS = () if library.why_absent() else library.instruction_sets()
ROWS, INNER, OUT = 53, 300, 35


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    library.select_instruction_set(request.param)
    yield request.param
    library.select_instruction_set()


def code_of(width: int, lowest: int) -> ByteCode:
    """Codes from `lowest` on, `width` bits of them, around the byte 128."""
    return ByteCode(library.UNIFORM, 1.0, 128, lowest, lowest + 2**width - 1, width, unit=1.0)


def weights(bits: int, shape: str) -> Tensor:
    """Codes of so many bits: all as often, bell-shaped as trained ones are, or each as large as it can be."""
    generator, limit = torch.Generator().manual_seed(bits), 2 ** (bits - 1)
    if shape == "even":
        return torch.randint(-limit, limit, (OUT, INNER), generator=generator).float()
    if shape == "extreme":
        return torch.full((OUT, INNER), -float(limit))
    return (torch.randn(OUT, INNER, generator=generator) * limit / 3.5).round().clamp(-limit, limit - 1)


@pytest.mark.parametrize("shape", ["even", "bell", "extreme"])
@pytest.mark.parametrize(("width", "lowest"), [(8, 0), (7, 64), (4, 120), (2, 0)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_sums_are_exact_at_every_pair_of_widths(
    bits: int, width: int, lowest: int, shape: str, instructions: str
) -> None:
    code, weight = code_of(width, lowest), weights(bits, shape)
    codes = torch.randint(lowest, lowest + 2**width, (ROWS, INNER), dtype=torch.uint8)
    layer = IntegerLinear(QuantizedLinear(weight, None, UniformQuantizer(bits, 1.0), None), code)
    expected = (codes.numpy().astype(np.int64) - 128) @ weight.numpy().astype(np.int64).T
    assert np.array_equal(layer(codes).numpy().astype(np.int64), expected)


def test_bytes_beyond_what_a_code_says_are_multiplied_as_they_are(instructions: str) -> None:
    weight = weights(4, "bell")
    layer = IntegerLinear(QuantizedLinear(weight, None, UniformQuantizer(4, 1.0), None), code_of(4, 120))
    codes = torch.randint(0, 256, (ROWS, INNER), dtype=torch.uint8)
    expected = (codes.numpy().astype(np.int64) - 128) @ weight.numpy().astype(np.int64).T
    assert np.array_equal(layer(codes).numpy().astype(np.int64), expected)


@pytest.mark.parametrize("left", [(8, 0), (5, 112), (3, 10)])
@pytest.mark.parametrize("right", [(8, 0), (6, 96), (3, 240)])
def test_products_of_activations_are_exact_at_every_pair_of_widths(
    left: tuple[int, int], right: tuple[int, int], instructions: str
) -> None:
    a = torch.randint(left[1], left[1] + 2 ** left[0], (2, 29, 66), dtype=torch.uint8)
    b = torch.randint(right[1], right[1] + 2 ** right[0], (2, 66, 21), dtype=torch.uint8)
    found = IntegerMatmul(code_of(*left), code_of(*right))(a, b)
    expected = (a.numpy().astype(np.int64) - 128) @ (b.numpy().astype(np.int64) - 128)
    assert np.array_equal(found.numpy().astype(np.int64), expected)


def test_widths_are_timed_apart_where_they_choose_the_loop(instructions: str) -> None:
    eight, four = byte_code(UniformQuantizer(8, 0.1)), byte_code(UniformQuantizer(4, 0.1))
    assert eight is not None
    assert four is not None
    assert (time_key(eight) == time_key(four)) == (instructions != "avx2")
    assert ("7 bits and less" in library.speed_of_widths()) == (instructions == "avx2")
    assert linear_ms(4, 64, 32, 4, four, 1) > 0
