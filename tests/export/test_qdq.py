"""What QDQ nodes compute, against the quantizers themselves, in another runtime."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule

from fxquant.export.onnx_file import to_onnx
from fxquant.export.openvino_model import OpenvinoModel
from fxquant.export.qdq import QdqMatmul
from fxquant.export.qdq_values import FORMS, Codes, quantized
from fxquant.graph.notes import IMAGE_SHAPE
from fxquant.quantizers.adalog import AdaLogQuantizer, AdaLogZeroQuantizer
from fxquant.quantizers.codebook import CodebookQuantizer
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.log_sqrt2 import LogSqrt2Quantizer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.row_log import RowLogQuantizer
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.simulated import QuantizedMatmul
from tests.export.runtimes import run_in_onnxruntime, side_by_side

CHANNELS = 40

# Quantizers, and whether their codes are bytes in the file.
QUANTIZERS: dict[str, tuple[Quantizer, bool]] = {
    "symmetric, 8 bits": (UniformQuantizer(8, 0.01), True),
    "symmetric, 3 bits": (UniformQuantizer(3, 0.3), True),
    "with a zero-point, 8 bits": (UniformQuantizer(8, 0.02, 100), True),
    "with a zero-point, 4 bits": (UniformQuantizer(4, 0.2, 6), True),
    "a scale per channel": (UniformQuantizer(4, torch.linspace(0.05, 0.5, CHANNELS)), False),
    "a scale and a zero-point per channel": (
        UniformQuantizer(5, torch.linspace(0.05, 0.2, CHANNELS)[None], torch.arange(CHANNELS)[None] % 31), False,
    ),
    "12 bits": (UniformQuantizer(12, 0.001), False),
    "a zero-point below every code": (UniformQuantizer(8, 0.01, -3), False),
    "opt-m in a byte": (ShiftedRegionsQuantizer(4, 0.1, 1, 3), True),
    "opt-m in two": (ShiftedRegionsQuantizer(8, 0.002, 1, 5), False),
    "twin softmax in a byte": (ShiftedRegionsQuantizer(4, 0.01, 0, 3, negative=False), True),
    "log2 in a byte": (Log2Quantizer(3, 1.0), True),
    "log2 in two": (Log2Quantizer(4, 1.0), False),
    "log2 beyond": (Log2Quantizer(6, 1.0), False),
    "codebook, 3 bits": (CodebookQuantizer(3, 0.02, 100, [0, 40, 90, 99, 106, 130, 200]), True),
    "codebook, 2 bits, without zero": (CodebookQuantizer(2, 0.02, 0, [5, 30, 90, 255]), True),
    "codebook, 6 bits": (CodebookQuantizer(6, 0.02, 128, range(0, 252, 4)), True),
    "row-log": (RowLogQuantizer(3, 1.2), False),
    "log-sqrt2": (LogSqrt2Quantizer(4, 1.0), False),
    "adalog": (AdaLogQuantizer(4, 2.0, 20), False),
    "adalog with an offset": (AdaLogQuantizer(3, 2.0, 30, offset=0.17), False),
    "adalog with a zero": (AdaLogZeroQuantizer(3, 2.0, 30, offset=0.17), False),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported() -> tuple[bytes, Tensor, Tensor]:
    """All quantizers in one file, images and the quantizers' values of them."""
    pytest.importorskip("onnxscript")
    x = torch.randn(200, 1, 1, CHANNELS, generator=torch.Generator().manual_seed(0))
    graph_module = side_by_side([quantizer for quantizer, _ in QUANTIZERS.values()], CHANNELS)
    return to_onnx(graph_module).content, x, graph_module(x)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_every_quantizer_gives_its_own_values(exported: tuple[bytes, Tensor, Tensor], runtime: str) -> None:
    pytest.importorskip(runtime)
    content, x, expected = exported
    found = run_in_onnxruntime(content, x) if runtime == "onnxruntime" else OpenvinoModel(content)(x)
    for index, (name, (quantizer, _)) in enumerate(QUANTIZERS.items()):
        torch.testing.assert_close(found[:, index], expected[:, index], rtol=1e-6, atol=2e-6, msg=name)
        if quantizer.bits < 8 and getattr(quantizer, "scale", torch.ones(2)).numel() == 1:
            assert len(found[:, index].unique()) <= 2**quantizer.bits, name


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.quick
def test_which_quantizers_get_codes(name: str) -> None:
    quantizer, has_codes = QUANTIZERS[name]
    assert isinstance(quantized(quantizer), Codes) == has_codes


def test_row_log_products_are_int8_and_divided_by_the_row() -> None:
    """Probabilities times values: levels of a byte on the left, the sum of the row's below."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    root, graph = nn.Module(), fx.Graph()
    root.add_module("softmax", nn.Softmax(-1))
    root.add_module("av", QuantizedMatmul(RowLogQuantizer(3, 1.2), UniformQuantizer(5, 0.2)))
    x = graph.placeholder("x")
    graph.output(graph.call_module("av", (graph.call_module("softmax", (x,)), x)))
    graph_module = GraphModule(root.eval(), graph).eval()
    IMAGE_SHAPE.write(graph_module, (1, 12, 12))
    images = torch.randn(9, 1, 12, 12, generator=torch.Generator().manual_seed(1)) * 2
    expected = graph_module(images)
    content = to_onnx(graph_module).content
    torch.testing.assert_close(run_in_onnxruntime(content, images), expected, rtol=1e-5, atol=1e-5)
    module = QdqMatmul(root.av, FORMS["any"])
    assert isinstance(module.left, Codes)
    assert isinstance(module.right, Codes)
