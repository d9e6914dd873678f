"""Quantizers of every kind, numbers and layers for tests of the kernels, and what they give in numpy's integers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxquant.quantizers.codebook import CodebookQuantizer
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.row_log import RowLogQuantizer
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode, byte_code
from fxquant.runtime.simulated import QuantizedLinear

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
