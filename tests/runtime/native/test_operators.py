"""Operators of torch that call the kernels: torch's own checks, patches and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxquant.errors import BackendError
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime import simulated
from fxquant.runtime.integer import lowered
from fxquant.runtime.integer.byte_codes import byte_code
from fxquant.runtime.integer.chain import IntegerChain, Step
from fxquant.runtime.integer.lowered import ToCodes
from tests.lowering import needs_kernels


@needs_kernels
@pytest.mark.parametrize(
    "operator",
    ["quantize", "layer_norm", "norm", "mean", "linear", "matmul", "attention", "patches", "tokens", "chain"],
)
def test_operators_pass_torchs_own_checks(operator: str) -> None:
    code = byte_code(UniformQuantizer(8, 0.1))
    spec = ToCodes(code).spec
    weight = nn.Linear(6, 5)
    source = simulated.QuantizedLinear(weight.weight, weight.bias, UniformQuantizer(4, torch.full((5, 1), 0.1)), None)
    codes = torch.randint(0, 256, (2, 4, 6), dtype=torch.uint8)
    matmul = lowered.IntegerMatmul(code, code)
    attention = lowered.IntegerAttention(1, 2, lowered.AttentionCodes((code,) * 3, code, code))
    norm = lowered.LayerNormToCodes(nn.LayerNorm(6), code)
    steps = [Step(norm, 0), Step(lowered.IntegerLinear(source, code), 1)]
    arguments: dict[str, tuple[Any, ...]] = {
        "quantize": (torch.randn(3, 4), spec),
        "layer_norm": (torch.randn(3, 4), spec, torch.ones(4), None, 1e-6),
        "norm": (torch.randn(3, 4), torch.ones(4), None, 1e-6),
        "mean": (torch.randn(3, 4, 5),),
        "linear": (codes, lowered.IntegerLinear(source, code).layout, 5, False, None),
        "matmul": (codes, codes, matmul.levels, 128, 0.01, True),
        "attention": (codes, attention.spec, None),
        "patches": (torch.randint(0, 256, (2, 3, 7, 9), dtype=torch.uint8), [3, 2], [2, 3]),
        "tokens": (torch.randn(2, 4, 6), torch.randn(4, 6), torch.randn(1, 6)),
        "chain": (torch.randn(2, 4, 6), IntegerChain(steps, 6, 5).layout, 5, False, 2),
    }
    torch.library.opcheck(getattr(torch.ops.fxquant, operator).default, arguments[operator])


@needs_kernels
@pytest.mark.quick
def test_results_are_float32_whatever_torchs_default_is() -> None:
    levels = lowered.IntegerMatmul(*2 * (byte_code(UniformQuantizer(8, 0.1)),)).levels
    codes, x = torch.arange(48, dtype=torch.uint8).view(2, 4, 6), torch.randn(2, 4, 6)

    def results() -> list[torch.Tensor]:
        kernels = torch.ops.fxquant
        products = kernels.matmul(codes, codes, levels, 128, 0.01, True)
        return [products, kernels.mean(x), kernels.tokens(x, x[0], x[1])]

    wanted = results()
    torch.set_default_dtype(torch.float64)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@needs_kernels
@pytest.mark.parametrize(
    ("kernel", "stride"), [((16, 16), (16, 16)), ((3, 5), (2, 1)), ((1, 1), (4, 3)), ((20, 33), (1, 1))]
)
def test_patches_are_what_unfold_gives(kernel: tuple[int, int], stride: tuple[int, int]) -> None:
    codes = torch.randint(0, 256, (3, 4, 20, 33), dtype=torch.uint8)
    found = torch.ops.fxquant.patches(codes, kernel, stride)
    expected = codes.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    assert torch.equal(found, expected.permute(0, 2, 3, 1, 4, 5).flatten(3))
    with pytest.raises(BackendError, match="have no patches"):
        torch.ops.fxquant.patches(codes, (21, 1), stride)


@needs_kernels
@pytest.mark.parametrize("front", [0, 2])
def test_tokens_are_joined_and_added(front: int) -> None:
    x, positions, first = torch.randn(3, 70, 8), torch.randn(70, 8), torch.randn(front, 8)
    found = torch.ops.fxquant.tokens(x, positions, first)
    assert torch.equal(found, torch.cat([first.expand(3, -1, -1), x + positions], 1))
    with pytest.raises(BackendError, match="do not fit tokens"):
        torch.ops.fxquant.tokens(x, positions[1:], first)
