"""Linear layers as integers through torch's own int8 products, for where our kernels do not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxquant.errors import BackendError
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.simulated import QuantizedWeightModule


class TorchLinear(nn.Module):
    """Weights as int8, input quantized in torch.

    weight_codes: int8 (out, in). scale: float32 (out,), of weights. bias: float32 (out,).
    """

    weight_codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, source: QuantizedWeightModule, code: ByteCode) -> None:
        """code: of the input, its bytes the codes of a uniform quantizer."""
        super().__init__()
        quantizer, codes = source.weight_quantizer, source.weight_codes
        if not isinstance(quantizer, UniformQuantizer) or quantizer.zero_point is not None or codes is None:
            raise BackendError("only weights of a symmetric uniform quantizer run as integers")
        self.code = code
        self.register_buffer("weight_codes", codes.detach().flatten(1).contiguous())
        self.register_buffer("scale", quantizer.scale.reshape(-1).expand(len(codes)).contiguous())
        self.register_buffer("bias", source.bias)

    def codes(self, x: Tensor) -> Tensor:
        """float32 to codes of the same shape, float32: whole numbers from 0 to 255."""
        code = self.code
        return torch.round(x * (1 / code.scale)).add_(code.zero).clamp_(code.low, code.high)


class OnednnLinear(TorchLinear):
    """Through oneDNN, on processors with AVX512-VNNI."""

    zero: Tensor

    def __init__(self, source: QuantizedWeightModule, code: ByteCode) -> None:
        super().__init__(source, code)
        self.register_buffer("zero", torch.zeros(len(self.weight_codes), dtype=torch.int32))
        # The weight in oneDNN's own order, an opaque tensor that can neither be copied nor saved: made on first use.
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., in) to float32 (..., out)."""
        if x.numel() == 0:  # oneDNN has no product of no rows
            return x.new_empty((*x.shape[:-1], len(self.scale)))
        if self._packed is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.weight_codes, None)
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            self.codes(x).to(torch.uint8), self.code.scale, self.code.zero, self._packed, self.scale, self.zero,
            self.bias, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


_MULTIPLE, _FEWEST_ROWS = 8, 17
"""What cuBLAS asks of the sizes of int8 products: columns and inner sizes are multiples, rows not too few."""


class IntMmLinear(TorchLinear):
    """Through `torch._int_mm`, made for CUDA's int8 tensor cores; it gives the same anywhere."""

    column_sums: Tensor

    def __init__(self, source: QuantizedWeightModule, code: ByteCode) -> None:
        super().__init__(source, code)
        self.register_buffer("column_sums", self.weight_codes.sum(1, dtype=torch.int32))
        self.out_features, inner = self.weight_codes.shape
        self.padding = (0, -inner % _MULTIPLE)
        padded = functional.pad(self.weight_codes, (*self.padding, 0, -self.out_features % _MULTIPLE))
        self.register_buffer("weight_codes", padded)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., in) to float32 (..., out)."""
        codes = (self.codes(x) - 128).to(torch.int8).flatten(0, -2)
        rows = len(codes)
        codes = functional.pad(codes, (*self.padding, 0, max(0, _FEWEST_ROWS - rows)))
        sums = torch._int_mm(codes, self.weight_codes.t())[:rows, : self.out_features]
        sums = sums - (self.code.zero - 128) * self.column_sums
        result = sums.float() * (self.scale * self.code.scale)
        if self.bias is not None:
            result = result + self.bias
        return result.view(*x.shape[:-1], self.out_features)
