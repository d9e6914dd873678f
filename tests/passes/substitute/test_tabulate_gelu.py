"""TabulateGelu changes the result by less than quantization does, and runs as a table."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxquant
from fxquant.data import embedded
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_table import BITS
from fxquant.runtime.simulated import QuantizedInput
from passes.lower.lower import Lower
from passes.pipeline.contract import PassContext
from passes.substitute.tabulate_gelu import TabulateGelu, input_quantizer
from tests.lowering import needs_kernels
from tests.models import embedded_compiled

MODEL, IMAGES = embedded.load_model(), embedded.calibration_images(8)


def tabulated(graph_module: torch.fx.GraphModule) -> list[QuantizedInput]:
    return [m for m in graph_module.modules() if isinstance(m, QuantizedInput) and isinstance(m.inner, nn.GELU)]


@pytest.fixture(scope="module")
def quantized() -> fxquant.Compiled:
    return embedded_compiled("W4A4", "mptq_vit", len(IMAGES))


def test_every_gelu_of_few_levels_has_a_table_and_keeps_its_result(quantized: fxquant.Compiled) -> None:
    context = PassContext(IMAGES)
    before, after = quantized.graph_module, copy.deepcopy(quantized.graph_module)
    changed = TabulateGelu().apply(after, context)
    assert changed == len(tabulated(after)) == 6
    assert TabulateGelu().apply(after, context) == 0
    assert not tabulated(before)
    assert all(m.input_quantizer.bits == BITS for m in tabulated(after))
    with torch.inference_mode():
        exact = MODEL(IMAGES)
        errors = [(graph_module(IMAGES) - exact).norm() for graph_module in (before, after)]
    assert errors[1] < 1.2 * errors[0]  # single codes change, here and there, and so do those that follow


@needs_kernels
def test_kernels_look_up_what_the_graph_computes(quantized: fxquant.Compiled) -> None:
    graph_module = copy.deepcopy(quantized.graph_module).double()
    TabulateGelu().apply(graph_module, PassContext(IMAGES))
    lowered = copy.deepcopy(graph_module).float()
    Lower("cpu-native").apply(lowered, PassContext(IMAGES))
    assert not tabulated(lowered)
    with torch.inference_mode():
        expected, found = graph_module(IMAGES.double()), lowered(IMAGES)
    assert (expected.argmax(1) == found.argmax(1)).all()
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_levels_too_close_for_a_table_keep_gelu() -> None:
    graph_module = copy.deepcopy(embedded_compiled("W8A8", "mptq_vit", len(IMAGES)).graph_module)
    assert TabulateGelu().apply(graph_module, PassContext(IMAGES)) < 6


@pytest.mark.parametrize("top", [0.2, 0.5, 0.9, 1.0, 1.1, 1.2, 2.0, 9.0])
@pytest.mark.parametrize("bits", [3, 4, 6, 7])
def test_what_is_far_out_gets_the_first_and_the_last_code(top: float, bits: int) -> None:
    levels = 2**bits - 1
    following = UniformQuantizer(bits, (top + 0.17) / levels, round(0.17 * levels / (top + 0.17)))
    quantizer = input_quantizer(nn.GELU(), following)
    x = torch.tensor([-100.0, -9.0, top + 0.3, 100.0])
    assert torch.equal(following.quantize(functional.gelu(quantizer(x))), following.quantize(functional.gelu(x)))
