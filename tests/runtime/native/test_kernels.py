"""The kernels against integer arithmetic in numpy, in every instruction set this machine has."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxquant.quantizers.codebook import CodebookQuantizer
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.row_log import RowLogQuantizer
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode, byte_code
from fxquant.runtime.integer.byte_table import BITS, byte_table
from fxquant.runtime.integer.lowered import (
    AttentionCodes,
    Epilogue,
    IntegerAttention,
    IntegerConv2d,
    IntegerLinear,
    IntegerMatmul,
    LayerNormToCodes,
    RowLogToCodes,
    ToCodes,
)
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedLinear

pytestmark = pytest.mark.skipif(library.why_absent() is not None, reason=str(library.why_absent()))

SETS = () if library.why_absent() else library.instruction_sets()
QUANTIZERS: dict[str, Quantizer] = {
    "symmetric 8": UniformQuantizer(8, 0.03),
    "symmetric 3": UniformQuantizer(3, 0.5),
    "asymmetric 8": UniformQuantizer(8, 0.02, 77),
    "asymmetric 5": UniformQuantizer(5, 0.1, 31),
    "asymmetric 2": UniformQuantizer(2, 1.0, 0),
    "opt-m 8": ShiftedRegionsQuantizer(8, 0.003, 2, 6),
    "opt-m 4, far": ShiftedRegionsQuantizer(4, 0.0004, 3, 13),
    "opt-m 2": ShiftedRegionsQuantizer(2, 0.5, 0, 2),
    "three digits": ShiftedRegionsQuantizer(6, 1e-5, 4, 16),
    "twin softmax": ShiftedRegionsQuantizer(6, 0.004, 0, 3, negative=False),
    "one region bit": ShiftedRegionsQuantizer(3, 0.1, 1, 1),
    "log2 4": Log2Quantizer(4, 2.0),
    "log2 2": Log2Quantizer(2, 1.0),
    "codebook 3": CodebookQuantizer(3, 0.02, 77, [0, 40, 70, 77, 80, 95, 160]),
    "codebook 5": CodebookQuantizer(5, 0.02, 3, [*range(0, 60, 3), *range(60, 256, 17)]),
}


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    library.select_instruction_set(request.param)
    yield request.param
    library.select_instruction_set()


ROW_LOG = {f"row-log {bits}": RowLogQuantizer(bits, base) for bits, base in ((2, 3.0), (4, 0.6), (8, 0.04))}


def code_of(name: str) -> ByteCode:
    found = byte_code((QUANTIZERS | ROW_LOG)[name])
    assert found is not None
    return found


def level_table(code: ByteCode) -> np.ndarray:
    return np.arange(256) - code.zero if code.identity else code.levels


def values(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Numbers on both sides of zero and far beyond every quantizer's range."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-3, 1, shape[-1])


def linear(out: int, inner: int, bits: int, seed: int = 0, bias: bool = True) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(out, 1, generator=generator) * 0.01 + 0.001
    weight = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, inner), generator=generator) * scale
    return QuantizedLinear(
        weight, torch.randn(out, generator=generator) if bias else None, UniformQuantizer(bits, scale), None
    )


def integers(module: QuantizedLinear, code: ByteCode, codes: Tensor) -> np.ndarray:
    """T = sum of levels times weight codes, int64."""
    assert module.weight_codes is not None
    return level_table(code)[codes.numpy()] @ module.weight_codes.flatten(1).numpy().astype(np.int64).T


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


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 1, 1), (7, 33, 17), (13, 96, 64), (50, 130, 75), (6, 64, 131)])
def test_integer_sums_are_exact(bits: int, rows: int, inner: int, out: int, instructions: str) -> None:
    code = code_of("asymmetric 8")
    module = linear(out, inner, bits, seed=bits, bias=False)
    assert isinstance(module.weight_quantizer, UniformQuantizer)
    module.weight_quantizer.scale.fill_(1.0)  # scales of one and no bias show the sums themselves
    unit = ByteCode(code.kind, 1.0, code.zero, 0, 255, 8, unit=1.0)
    codes = torch.randint(0, 256, (rows, inner), dtype=torch.uint8)
    found = IntegerLinear(module, unit)(codes)
    assert np.array_equal(found.numpy().astype(np.int64), integers(module, unit, codes))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_linear_equals_the_simulated_one(name: str, instructions: str) -> None:
    code, module = code_of(name), linear(43, 70, 5)
    codes = ToCodes(code)(values(name, (29, 70)))
    exact = integers(module, code, codes) * code.unit * module.weight_quantizer.scale.double().numpy().T
    expected = exact + module.bias.double().numpy()
    np.testing.assert_allclose(IntegerLinear(module, code)(codes).numpy(), expected, rtol=3e-7, atol=1e-6)


def test_largest_sums_do_not_overflow(instructions: str) -> None:
    module = linear(3, 4096, 8)
    module.weight_codes.fill_(-128)
    module.weight_quantizer.scale.fill_(1.0)
    module.bias.zero_()
    unit = ByteCode(library.UNIFORM, 1.0, 0, 0, 255, 8, unit=1.0)
    found = IntegerLinear(module, unit)(torch.full((5, 4096), 255, dtype=torch.uint8))
    assert (found == float(np.float32(-128 * 255 * 4096))).all()


@pytest.mark.parametrize("name", ["symmetric 8", "opt-m 4, far"])
def test_epilogues(name: str, instructions: str) -> None:
    code, module = code_of(name), linear(48, 50, 4)
    codes = ToCodes(code)(values(name, (31, 50)))
    plain = IntegerLinear(module, code)(codes)
    residual = torch.randn(31, 48)
    added = IntegerLinear(module, code, Epilogue(library.RESIDUAL))(codes, residual)
    assert torch.equal(added, residual + plain)
    outputs = (code_of("symmetric 3"), code_of("asymmetric 8"), code_of("symmetric 8"))
    factors = (0.35, 1.0, -2.0)
    ranges = IntegerLinear(module, code, Epilogue(library.CODES, outputs, factors))(codes)
    parts = [
        ToCodes(output)(part * factor)
        for output, part, factor in zip(outputs, plain.split(16, 1), factors, strict=True)
    ]
    assert torch.equal(ranges, torch.cat(parts, 1))
    for output in QUANTIZERS:
        after = IntegerLinear(module, code, Epilogue(library.GELU_CODES, (code_of(output),)))(codes)
        expected = ToCodes(code_of(output))(functional.gelu(plain))
        different = after != expected
        # GELU is computed in another way than torch's: a value beside a threshold may fall on its other side.
        assert different.float().mean() < 1e-3, output


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


def test_gelu_is_accurate(instructions: str) -> None:
    x = torch.linspace(-8, 8, 4001)
    module = linear(4001, 1, 2, bias=False)
    module.weight_codes.fill_(0)
    module.bias = x.clone()
    fine = byte_code(UniformQuantizer(8, 0.01))
    found = IntegerLinear(module, code_of("symmetric 8"), Epilogue(library.GELU_CODES, (fine,)))(
        torch.zeros(1, 1, dtype=torch.uint8)
    )
    expected = torch.round(functional.gelu(x.double()) / 0.01).clamp(-128, 127) + 128
    off = (found[0].double() - expected).abs()
    assert off.max() <= 1
    assert off.sum() <= 2


@pytest.mark.parametrize("channels", [1, 16, 37, 96, 384])
def test_layer_norm_gives_the_codes_of_the_norm(channels: int, instructions: str) -> None:
    norm = nn.LayerNorm(channels, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.rand(channels) + 0.5)
    norm.bias.copy_(torch.randn(channels))
    x = torch.randn(70, channels) * 3 + 1
    code = code_of("symmetric 8")
    found = LayerNormToCodes(norm, code)(x).double()
    exact = nn.functional.layer_norm(x.double(), (channels,), norm.weight.double(), norm.bias.double(), 1e-6)
    # Half a step of the code, and what float32 adds where values are almost equal.
    step = (found - 128) * code.unit - exact.clamp(-128 * code.unit, 127 * code.unit)
    assert step.abs().max() <= code.unit * 0.501


@pytest.mark.parametrize("left", ["symmetric 8", "asymmetric 5", "twin softmax", "opt-m 4, far", "log2 4"])
@pytest.mark.parametrize("right", ["symmetric 8", "asymmetric 8"])
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (26, 13, 18), (49, 32, 49), (5, 64, 40)])
def test_matmul_of_codes(left: str, right: str, n: int, k: int, m: int, instructions: str) -> None:
    left_code, right_code = code_of(left), code_of(right)
    a = ToCodes(left_code)(values(left, (2, 3, n, k)))
    b = ToCodes(right_code)(values(right, (2, 3, k, m), 1))
    exact = level_table(left_code)[a.numpy()] @ level_table(right_code)[b.numpy()]
    module = IntegerMatmul(left_code, right_code)
    expected = exact * left_code.unit * right_code.unit
    for operand in (b, b.mT.contiguous().mT):
        np.testing.assert_allclose(module(a, operand).numpy(), expected, rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize("name", list(ROW_LOG))
def test_products_with_row_log_codes_equal_the_simulated_ones(name: str, instructions: str) -> None:
    code, right_code, quantizer = code_of(name), code_of("asymmetric 8"), ROW_LOG[name]
    x = (torch.randn(2, 3, 30, 50) * 3).softmax(-1)
    b = ToCodes(right_code)(values("asymmetric 8", (2, 3, 50, 16), 1))
    expected = quantizer(x).double() @ QUANTIZERS["asymmetric 8"].dequantize(b.int()).double()
    found = IntegerMatmul(code, right_code)(RowLogToCodes(code)(x), b)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softmax", ["twin softmax", "log2 4", "asymmetric 8", "opt-m 4, far", *ROW_LOG])
@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 1), (50, 3, 32), (37, 2, 9), (26, 1, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_equals_its_parts(
    softmax: str, tokens: int, heads: int, size: int, with_bias: bool, instructions: str
) -> None:
    query, key, value = code_of("symmetric 8"), code_of("asymmetric 8"), code_of("symmetric 8")
    codes = AttentionCodes((query, key, value), code_of(softmax), code_of("symmetric 8"))
    qkv = torch.randint(0, 256, (4, tokens, 3, heads, size), dtype=torch.uint8)
    bias = torch.randn(2, heads, tokens, tokens) if with_bias else None
    found = IntegerAttention(heads, size, codes, bias)(qkv.flatten(2))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    scores = IntegerMatmul(query, key)(q, k.mT)
    if bias is not None:
        scores = (scores.view(2, 2, heads, tokens, tokens) + bias).flatten(0, 1)
    to_codes = RowLogToCodes if codes.softmax.of_rows else ToCodes
    weights = to_codes(codes.softmax)(scores.double().softmax(-1).float())
    result = IntegerMatmul(codes.softmax, value)(weights, v)
    expected = ToCodes(codes.output)(result.transpose(1, 2).flatten(2))
    # The softmax is computed in another way: where a weight lies beside a threshold, sums move by one step.
    difference = found.int() - expected.int()
    assert (difference != 0).float().mean() < 0.01
    assert difference.abs().max() <= 3


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(4, 4, 0), (3, 2, 1), ((2, 3), (1, 2), (0, 1))])
def test_convolution_of_codes(kernel: object, stride: object, padding: object, instructions: str) -> None:
    conv = nn.Conv2d(3, 10, kernel, stride, padding)
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": (1, 1), "groups": 1}
    quantizer = UniformQuantizer(6, conv.weight.detach().flatten(1).abs().amax(1, keepdim=True) / 31)
    source = QuantizedConv2d(conv.weight, conv.bias, quantizer, QUANTIZERS["asymmetric 8"], geometry)
    x = torch.rand(2, 3, 13, 12) * 4 - 1
    code = code_of("asymmetric 8")
    torch.testing.assert_close(IntegerConv2d(source, code)(ToCodes(code)(x)), source(x), rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_threads_or_instructions() -> None:
    code, module = code_of("opt-m 8"), linear(200, 150, 3)
    x = values("opt-m 8", (333, 150))
    codes = AttentionCodes((code_of("symmetric 8"),) * 3, code_of("twin softmax"), code_of("symmetric 8"))
    attention, norm = IntegerAttention(2, 25, codes), LayerNormToCodes(nn.LayerNorm(150), code)
    layer = IntegerLinear(module, code, Epilogue(library.GELU_CODES, (code_of("opt-m 4, far"),)))
    results = []
    try:
        for name in SETS:
            library.select_instruction_set(name)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                inputs = ToCodes(code)(x)
                results.append((inputs, layer(inputs), norm(x), attention(inputs[:330].view(2, 165, 150))))
    finally:
        torch.set_num_threads(1)
        library.select_instruction_set()
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            assert torch.equal(first, other)


ONES = torch.ones(200_000)


def test_a_forked_process_can_run_kernels_on_threads() -> None:
    torch.set_num_threads(3)
    try:
        before = sum_of_codes()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply_async(sum_of_codes).get(timeout=30) == before
    finally:
        torch.set_num_threads(1)


def sum_of_codes() -> int:
    """Without torch's own threads, which do not survive a fork."""
    return int(ToCodes(code_of("symmetric 8"))(ONES).numpy().sum())


def test_sizes_in_memory_are_the_packed_ones() -> None:
    for bits in range(2, 9):
        layout = IntegerLinear(linear(384, 384, bits), code_of("symmetric 8")).layout
        overhead = ctypes.sizeof(library.LinearSpec) + 64 + 3 * 384 * 4
        assert 384 * 384 * bits // 8 <= layout.numel() <= 384 * 384 * bits // 8 + overhead
