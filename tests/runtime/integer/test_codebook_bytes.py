"""Codebooks in the kernels: their bytes are the book's nearest codes to what the grid alone gives, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import BackendError
from fxquant.quantizers.codebook import CodebookQuantizer
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode, byte_code
from fxquant.runtime.integer.byte_table import BITS, byte_table
from fxquant.runtime.integer.lowered import (
    AttentionCodes,
    Epilogue,
    IntegerAttention,
    IntegerConv2d,
    IntegerLinear,
    LayerNormToCodes,
    ToCodes,
)
from fxquant.runtime.native import library, operators
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedLinear
from tests.lowering import needs_kernels

pytestmark = needs_kernels


def book(bits: int, count: int, seed: int, scale: float = 0.03) -> CodebookQuantizer:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randperm(256, generator=generator)[:count].sort().values.tolist()
    return CodebookQuantizer(bits, scale, int(torch.randint(0, 256, (), generator=generator)), codes)


BOOKS = {
    "one code": CodebookQuantizer(1, 0.03, 200, [7]),
    "two, at the ends": CodebookQuantizer(1, 0.03, 128, [0, 255]),
    "side by side": CodebookQuantizer(2, 0.03, 100, [99, 100, 101, 102]),
    "3 bits": book(3, 8, 0),
    "4 bits, not all": book(4, 13, 1),
    "5 bits": book(5, 32, 2),
}


def code_of(quantizer: CodebookQuantizer | UniformQuantizer) -> ByteCode:
    found = byte_code(quantizer)
    assert found is not None
    return found


def grid_of(quantizer: CodebookQuantizer) -> ByteCode:
    """All bytes of the book's grid."""
    return code_of(UniformQuantizer(8, float(quantizer.scale), quantizer.zero))


def snapped(quantizer: CodebookQuantizer, grid_bytes: Tensor) -> Tensor:
    return code_of(quantizer).to_bytes(quantizer.index[grid_bytes.long()])


def layer(out: int, inner: int, code: ByteCode, epilogue: Epilogue, seed: int = 0) -> IntegerLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator)
    quantizer = UniformQuantizer(4, torch.full((out, 1), 0.3))
    return IntegerLinear(
        QuantizedLinear(weight, torch.randn(out, generator=generator), quantizer, None), code, epilogue
    )


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize("count", [1, 15, 16, 31, 33, 64, 129, 5000])
def test_bytes_are_the_quantizers(name: str, count: int, instructions: str) -> None:
    quantizer, code = BOOKS[name], code_of(BOOKS[name])
    x = torch.randn(count) * 3
    x[:3] = torch.tensor([1e30, -1e30, 0.0])[:count]
    found = ToCodes(code)(x)
    assert torch.equal(found, code.to_bytes(quantizer.quantize(x)))
    assert torch.equal((found.float() - code.zero) * code.unit, quantizer(x))


@pytest.mark.parametrize("name", BOOKS)
def test_every_byte_of_the_grid(name: str, instructions: str) -> None:
    quantizer = BOOKS[name]
    x = (torch.arange(256).float() - quantizer.zero) * quantizer.scale
    assert torch.equal(ToCodes(code_of(quantizer))(x), code_of(quantizer).to_bytes(quantizer.quantize(x)))


@pytest.mark.parametrize("channels", [1, 37, 96, 384])
@pytest.mark.parametrize("name", ["side by side", "4 bits, not all"])
def test_layer_norm(name: str, channels: int, instructions: str) -> None:
    norm, quantizer, x = nn.LayerNorm(channels).requires_grad_(False), BOOKS[name], torch.randn(70, channels)
    norm.weight.copy_(torch.rand(channels) + 0.5)
    fine = LayerNormToCodes(norm, grid_of(quantizer))(x)
    assert torch.equal(LayerNormToCodes(norm, code_of(quantizer))(x), snapped(quantizer, fine))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [5, 16, 40, 64])
def test_each_column_range_has_its_own_quantizer(width: int, threads: int, instructions: str) -> None:
    quantizers = (BOOKS["3 bits"], UniformQuantizer(8, 0.02), BOOKS["5 bits"])
    source, factors = code_of(BOOKS["4 bits, not all"]), (0.35, 1.0, -2.0)
    grids = tuple(grid_of(q) if isinstance(q, CodebookQuantizer) else code_of(q) for q in quantizers)
    codes = ToCodes(source)(torch.randn(150, 50))
    torch.set_num_threads(threads)
    try:
        fine = layer(3 * width, 50, source, Epilogue(library.CODES, grids, factors))(codes)
        books = tuple(code_of(quantizer) for quantizer in quantizers)
        found = layer(3 * width, 50, source, Epilogue(library.CODES, books, factors))(codes)
    finally:
        torch.set_num_threads(1)
    parts = [
        snapped(quantizer, part) if isinstance(quantizer, CodebookQuantizer) else part
        for quantizer, part in zip(quantizers, fine.split(width, 1), strict=True)
    ]
    assert torch.equal(found, torch.cat(parts, 1))


@pytest.mark.parametrize("name", BOOKS)
def test_gelu(name: str, instructions: str) -> None:
    quantizer, source = BOOKS[name], code_of(UniformQuantizer(8, 0.05))
    codes = ToCodes(source)(torch.randn(33, 50))
    fine = layer(75, 50, source, Epilogue(library.GELU_CODES, (grid_of(quantizer),)))(codes)
    found = layer(75, 50, source, Epilogue(library.GELU_CODES, (code_of(quantizer),)))(codes)
    assert torch.equal(found, snapped(quantizer, fine))


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 1), (50, 3, 32), (37, 2, 9), (26, 1, 64)])
def test_attention(tokens: int, heads: int, size: int, instructions: str) -> None:
    quantizer, softmax = BOOKS["4 bits, not all"], byte_code(Log2Quantizer(4, 1.0))
    assert softmax is not None
    operands = (code_of(BOOKS["3 bits"]), code_of(BOOKS["5 bits"]), code_of(UniformQuantizer(8, 0.03)))
    qkv = torch.randint(0, 256, (4, tokens, 3 * heads * size), dtype=torch.uint8)
    fine = IntegerAttention(heads, size, AttentionCodes(operands, softmax, grid_of(quantizer)))(qkv)
    found = IntegerAttention(heads, size, AttentionCodes(operands, softmax, code_of(quantizer)))(qkv)
    assert torch.equal(found, snapped(quantizer, fine))


def test_tables_are_made_of_codes(instructions: str) -> None:
    quantizer, source = BOOKS["3 bits"], code_of(UniformQuantizer(8, 0.05))
    fine = UniformQuantizer(BITS, 4e-4, 9000)
    table = byte_table(fine, nn.GELU(), code_of(quantizer))
    assert table is not None
    assert set(table.entries[::2].flatten().tolist()) <= set(quantizer.codes)
    found = layer(75, 50, source, Epilogue(library.TABLE_CODES, table=table))(ToCodes(source)(torch.randn(33, 50)))
    assert set(found.flatten().tolist()) <= set(quantizer.codes)


def test_padding_is_zero_even_where_the_book_has_none(instructions: str) -> None:
    quantizer = CodebookQuantizer(3, 0.05, 20, [0, 10, 35, 60, 90, 130, 180, 255])
    conv = nn.Conv2d(3, 10, 3, 2, 1)
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": (1, 1), "groups": 1}
    weight = UniformQuantizer(6, conv.weight.detach().flatten(1).abs().amax(1, keepdim=True) / 31)
    source, x = QuantizedConv2d(conv.weight, conv.bias, weight, quantizer, geometry), torch.rand(2, 3, 13, 12) * 4 - 1
    code = code_of(quantizer)
    assert not code.has_zero
    torch.testing.assert_close(IntegerConv2d(source, code)(ToCodes(code)(x)), source(x), rtol=1e-5, atol=1e-5)


def test_equal_books_are_equal_codes_and_wide_ones_have_none() -> None:
    assert byte_code(book(4, 13, 1)) == code_of(BOOKS["4 bits, not all"])
    other = CodebookQuantizer(2, 0.03, 100, [99, 100, 101, 103])
    assert code_of(other) != code_of(BOOKS["side by side"])
    assert byte_code(book(6, 40, 0)) is None
    assert np.array_equal(code_of(other).levels_spec().zero, 100)


@pytest.mark.parametrize(
    "change",
    [
        {"codes": 0}, {"codes": 33}, {"codes": -1}, {"codes": 3}, {"low": 1}, {"high": 254}, {"zero": 256},
        {"scale": 0.0}, {"kind": library.UNIFORM}, {"code": {1: 99}}, {"code": {2: 100}}, {"below": {0: 100}},
        {"below": {0: 98}}, {"below": {2: 200}}, {"below": {3: 254}}, {"below": {3: 50}},
    ],
    ids=str,
)  # fmt: skip
def test_malformed_books_are_refused(change: dict[str, object]) -> None:
    spec = code_of(BOOKS["side by side"]).quantizer_spec()
    for name, value in change.items():
        if isinstance(value, dict):
            for place, number in value.items():
                getattr(spec, name)[place] = number
        else:
            setattr(spec, name, value)
    with pytest.raises(BackendError, match="a quantizer or its levels are malformed"):
        operators.quantize(torch.randn(7), operators.spec_tensor(spec))


def test_a_softmax_has_no_book() -> None:
    code = code_of(BOOKS["3 bits"])
    module = IntegerAttention(1, 4, AttentionCodes((code,) * 3, code, code))
    with pytest.raises(BackendError, match="a quantizer or its levels are malformed"):
        module(torch.zeros(1, 5, 12, dtype=torch.uint8))
