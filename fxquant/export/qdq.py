"""A simulated graph written with ONNX's QuantizeLinear and DequantizeLinear, which other runtimes run as int8.

- Uniform quantizers: Clip, QuantizeLinear, DequantizeLinear. Codes are int8 (symmetric) or uint8 (with a zero-point);
  the Clip, in float, keeps those of less than 8 bits in their range.
- Codebooks: QuantizeLinear to their grid, uint8; its codes looked up in a table of the book's; DequantizeLinear.
- Regions and powers of two (OPT-m, twin, log2) whose levels are integers n times a unit and span a byte: float
  operators that give the nearest level, then QuantizeLinear and DequantizeLinear with that unit, which change nothing.
- Row-log on the left of a product: the same with whole levels n, and the product divided by the sum of the row's.
- Everything else that is quantized gets its values from float operators and stays simulated: levels that span more
  than a byte (as two int8 products, of digits, they ran no faster in ONNX Runtime and OpenVINO), tables such as
  AdaLog's, inputs of layer norm with a scale per channel.

The modules here mean something to `torch.onnx.export` only: run eagerly, their codes are zeros.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from fxquant.export.qdq_values import Codes, RowLevels, Weight, quantized
from fxquant.graph.annotation import annotation_of
from fxquant.quantizers.row_log import LARGEST, RowLogQuantizer
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedInput, QuantizedLinear, QuantizedMatmul

INT8, SIMULATED = "int8", "simulated"


class QdqLinear(nn.Module):
    """A linear layer: one product with the dequantized weight."""

    bias: Tensor | None

    def __init__(self, source: QuantizedLinear) -> None:
        super().__init__()
        self.input = quantized(source.input_quantizer)
        self.weight = Weight(source, transposed=True, is_int8=isinstance(self.input, Codes))
        self.register_buffer("bias", source.bias)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., in) to (..., out)."""
        result = torch.matmul(self.input(x), self.weight())
        return result if self.bias is None else result + self.bias


class QdqConv2d(nn.Module):
    """A convolution with the dequantized weight."""

    bias: Tensor | None

    def __init__(self, source: QuantizedConv2d) -> None:
        super().__init__()
        self.input = quantized(source.input_quantizer)
        self.weight = Weight(source, transposed=False, is_int8=isinstance(self.input, Codes))
        self.geometry = source.geometry
        self.register_buffer("bias", source.bias)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (B, in, H, W) to (B, out, H', W')."""
        return functional.conv2d(self.input(x), self.weight(), self.bias, **self.geometry)


class QdqMatmul(nn.Module):
    """A product of two activations."""

    def __init__(self, source: QuantizedMatmul) -> None:
        super().__init__()
        left: Any = source.left_quantizer
        self.left, self.right = quantized(left), quantized(source.right_quantizer)
        self.of_rows = isinstance(left, RowLogQuantizer) and isinstance(self.right, Codes)
        if self.of_rows:
            self.left = Codes(torch.tensor(1 / LARGEST), torch.tensor(0, dtype=torch.uint8), nearest=RowLevels(left))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """left (..., n, d) times right (..., d, m)."""
        left = self.left(left)
        result = torch.matmul(left, self.right(right))
        return result / left.sum(-1, keepdim=True) if self.of_rows else result


class QdqInput(nn.Module):
    """Softmax or layer norm, in float, on quantized input."""

    def __init__(self, source: QuantizedInput) -> None:
        super().__init__()
        self.inner, self.input = source.inner, quantized(source.input_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """inner(Q(x))."""
        result: Tensor = self.inner(self.input(x))
        return result


_REPLACEMENTS: dict[type[nn.Module], Any] = {
    QuantizedLinear: QdqLinear,
    QuantizedConv2d: QdqConv2d,
    QuantizedMatmul: QdqMatmul,
    QuantizedInput: QdqInput,
}


def with_qdq(graph_module: GraphModule) -> tuple[GraphModule, dict[str, str]]:
    """A copy of a simulated graph for `torch.onnx.export`; and by layer "int8", or "simulated" for float operators."""
    found = copy.deepcopy(graph_module)
    written = {}
    for node in found.graph.nodes:
        node.meta.pop("nn_module_stack", None)  # of the model that was traced; the exporter would believe it
        if node.op != "call_module":
            continue
        module = found.get_submodule(str(node.target))
        if type(module) in _REPLACEMENTS:
            module = _REPLACEMENTS[type(module)](module)
            found.add_submodule(str(node.target), module)
        annotation = annotation_of(node)
        if annotation.has_bits:
            written[annotation.layer] = INT8 if _is_int8(module) else SIMULATED
    return found, written


def _is_int8(module: nn.Module) -> bool:
    if isinstance(module, QdqMatmul):
        return isinstance(module.left, Codes) and isinstance(module.right, Codes)
    is_layer = isinstance(module, QdqLinear | QdqConv2d)
    return is_layer and isinstance(module.input, Codes) and module.weight.bits is not None  # type: ignore[union-attr]
