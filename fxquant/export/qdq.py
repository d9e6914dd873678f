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

from fxquant.export.qdq_values import FORMS, Codes, Form, RowLevels, Weight, quantized
from fxquant.graph.annotation import annotation_of
from fxquant.quantizers.row_log import LARGEST, RowLogQuantizer
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedInput, QuantizedLinear, QuantizedMatmul

INT8, SIMULATED = "int8", "simulated"


class QdqLinear(nn.Module):
    """A linear layer: one product with the dequantized weight."""

    bias: Tensor | None

    def __init__(self, source: QuantizedLinear, form: Form) -> None:
        super().__init__()
        self.input = quantized(source.input_quantizer, form)
        self.weight = Weight(source, transposed=True, is_int8=isinstance(self.input, Codes))
        self.leading_axis = form.leading_axis
        self.register_buffer("bias", source.bias)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., in) to (..., out)."""
        is_matrix = self.leading_axis and x.ndim == 2
        result = torch.matmul(self.input(x[None] if is_matrix else x), self.weight())
        result = result if self.bias is None else result + self.bias
        return result[0] if is_matrix else result


class QdqConv2d(nn.Module):
    """A convolution with the dequantized weight."""

    bias: Tensor | None

    def __init__(self, source: QuantizedConv2d, form: Form) -> None:
        super().__init__()
        self.input = quantized(source.input_quantizer, form)
        self.window = tuple(source.weight_like.shape[2:])
        self.is_product = form.patch_products and _are_side_by_side(self.window, **source.geometry)
        self.weight = Weight(source, transposed=self.is_product, is_int8=isinstance(self.input, Codes))
        self.geometry = source.geometry
        self.register_buffer("bias", source.bias)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (B, in, H, W) to (B, out, H', W')."""
        if not self.is_product:
            return functional.conv2d(self.input(x), self.weight(), self.bias, **self.geometry)
        images, channels, *sides = x.shape
        (rows, high), (columns, wide) = ((side // step, step) for side, step in zip(sides, self.window, strict=True))
        x = self.input(x)[:, :, : rows * high, : columns * wide]
        patches = x.reshape(images, channels, rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5)
        result = torch.matmul(patches.reshape(images, rows * columns, channels * high * wide), self.weight())
        result = result if self.bias is None else result + self.bias
        return result.mT.reshape(images, -1, rows, columns)


def _are_side_by_side(window: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether every pixel is in one window of a convolution, and every window is multiplied by all of the weight.

    Args:
        window: height and width.
        stride: as `torch.nn.functional.conv2d` takes it, as are padding, dilation and groups.
        padding: likewise.
        dilation: likewise.
        groups: likewise.
    """
    stride, padding, dilation = (_pair(given) for given in (stride, padding, dilation))
    return (stride, padding, dilation, groups) == (window, (0, 0), (1, 1), 1)


def _pair(given: Any) -> Any:
    return (given, given) if isinstance(given, int) else tuple(given)


class QdqMatmul(nn.Module):
    """A product of two activations."""

    def __init__(self, source: QuantizedMatmul, form: Form) -> None:
        super().__init__()
        left: Any = source.left_quantizer
        self.left, self.right = quantized(left, form), quantized(source.right_quantizer, form)
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

    def __init__(self, source: QuantizedInput, form: Form) -> None:
        super().__init__()
        self.inner, self.input = source.inner, quantized(source.input_quantizer, form)

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


def with_qdq(graph_module: GraphModule, runtime: str = "any") -> tuple[GraphModule, dict[str, str]]:
    """A copy of a simulated graph for `torch.onnx.export`; and by layer "int8", or "simulated" for float operators.

    runtime: of `FORMS`, whose ways are taken.
    """
    found = copy.deepcopy(graph_module)
    written = {}
    for node in found.graph.nodes:
        node.meta.pop("nn_module_stack", None)  # of the model that was traced; the exporter would believe it
        if node.op != "call_module":
            continue
        module = found.get_submodule(str(node.target))
        if type(module) in _REPLACEMENTS:
            module = _REPLACEMENTS[type(module)](module, FORMS[runtime])
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
