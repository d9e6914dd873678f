"""The kernels against integer arithmetic in numpy, in every instruction set this machine has."""

from __future__ import annotations

import ctypes
import multiprocessing

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode, byte_code
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
from fxquant.runtime.simulated import QuantizedConv2d
from tests.runtime.kernel_inputs import QUANTIZERS, ROW_LOG, code_of, integers, level_table, linear, values


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
        for name in library.instruction_sets():
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
