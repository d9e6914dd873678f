"""Activation codes as bytes, and which integers the bytes stand for: how a quantizer runs in integer kernels.

A byte b stands for the integer level n(b), and the value is n(b) times a unit. Levels beyond a byte (regions and powers
of two that are far apart) are split into digits of base 256, n = sum 256^i d_i - zero, each digit a byte again; a
product with them is one integer product per digit, and exact. Up to three digits run; what needs more, or has levels
that are no integers, stays simulated. A codebook's bytes are codes of its grid, so what reads them reads a uniform
quantizer's. Bytes of a row-log quantizer are made of whole rows, and their levels are divided by the sum of the row's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxquant.quantizers.codebook import CodebookQuantizer, last_below
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.row_log import RowLogQuantizer
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.native.library import (
    CODEBOOK,
    LOG2,
    MAX_DIGITS,
    REGIONS,
    ROW_LOG,
    UNIFORM,
    LevelsSpec,
    QuantizerSpec,
)

_WIDEST = 8
_WIDEST_LOG2 = 4
_WIDEST_CODEBOOK = 5


@dataclass(frozen=True)
class ByteCode:
    """How one quantizer's codes are bytes.

    kind, scale (row-log: base), zero, low, high, bits, shift_small, shift_large, negative: as `QuantizerSpec` has them.

    Args:
        kind: as `QuantizerSpec` has it: which rule gives the bytes.
        scale: as `QuantizerSpec` has it; of row-log codes the base.
        zero: as `QuantizerSpec` has it: the byte of the value 0.
        low, high: as `QuantizerSpec` has them: the least and the largest byte.
        bits: width of the codes.
        shift_small, shift_large: as `QuantizerSpec` has them: powers of two between the scales of regions.
        negative: whether there are codes of negative values.
        levels: int64 (256,), the integer each byte stands for, 0 for bytes that never occur, where `identity` does not
            say it.
        unit: value of level 1.
        codes: of a codebook, ascending; none for other kinds. Equal codes compare equal, so readers of one edge can
            share them.
    """

    kind: int
    scale: float
    zero: int = 0
    low: int = 0
    high: int = 255
    bits: int = 8
    shift_small: int = 0
    shift_large: int = 0
    negative: bool = False
    levels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64), compare=False, repr=False)
    unit: float = field(default=1.0, compare=False)
    codes: tuple[int, ...] = ()

    @property
    def identity(self) -> bool:
        """Whether a byte less `zero` is its level."""
        return self.kind in (UNIFORM, CODEBOOK)

    @property
    def bytes_given(self) -> tuple[int, ...]:
        """The bytes that the quantizer gives, ascending."""
        if self.codes:
            return self.codes
        return tuple(range(self.low, self.high + 1)) if self.kind == UNIFORM else tuple(range(2**self.bits))

    @property
    def reach(self) -> int:
        """How far the numbers that are multiplied lie apart: of bytes, or the largest digit."""
        if self.identity:
            return self.bytes_given[-1] - self.bytes_given[0]
        spec = self.levels_spec()
        return max(int(number) for digit in range(spec.count) for number in spec.digit[digit])

    @property
    def has_zero(self) -> bool:
        """Whether the byte `zero` is made of zero; a codebook may be without it."""
        return self.kind == UNIFORM or self.zero in self.codes

    @property
    def of_rows(self) -> bool:
        """Whether bytes are made of whole rows, and levels divided by the sum of the row's."""
        return self.kind == ROW_LOG

    def quantizer_spec(self) -> QuantizerSpec:
        """For the kernels that produce bytes."""
        spec = QuantizerSpec(
            self.kind, self.scale, self.zero, self.low, self.high, self.bits,
            self.shift_small, self.shift_large, int(self.negative), len(self.codes),
        )  # fmt: skip
        if self.codes:
            spec.below[: len(self.codes)] = [*last_below(np.array(self.codes)).tolist(), 255]
            spec.code[: len(self.codes)] = self.codes
        return spec

    def levels_spec(self) -> LevelsSpec:
        """For the kernels that read bytes."""
        spec = LevelsSpec(1, int(self.identity), self.zero, self.unit)
        if self.identity:
            return spec
        spec.zero = -int(self.levels.min())
        rest = self.levels + spec.zero
        spec.count = max(1, -(-int(rest.max()).bit_length() // 8))
        for digit in range(spec.count):
            spec.digit[digit][:] = (rest >> (8 * digit) & 255).tolist()
        return spec

    def to_bytes(self, codes: Tensor) -> Tensor:
        """Bytes (uint8) of codes as the quantizer's `quantize` gives them (int32); for uniform ones and codebooks."""
        if self.codes:
            return torch.tensor(self.codes, dtype=torch.uint8)[codes.long()]
        return (codes + self.zero).to(torch.uint8)


def byte_code(quantizer: Quantizer | None) -> ByteCode | None:
    """How a quantizer's codes are bytes, None where they cannot be: no quantizer, several scales, too wide a range."""
    if isinstance(quantizer, RowLogQuantizer):
        return _row_log(quantizer)
    scale = getattr(quantizer, "scale", None)
    if quantizer is None or not isinstance(scale, Tensor) or scale.numel() != 1 or quantizer.bits > _WIDEST:
        return None
    makers = {
        UniformQuantizer: _uniform, ShiftedRegionsQuantizer: _regions, Log2Quantizer: _log2,
        CodebookQuantizer: _codebook,
    }  # fmt: skip
    maker = makers.get(type(quantizer))
    found = None if maker is None else maker(quantizer, float(scale))  # type: ignore[operator]
    if found is None or found.identity:
        return found
    span = int(found.levels.max() - found.levels.min())
    return found if span < 256**MAX_DIGITS else None


def _uniform(quantizer: UniformQuantizer, scale: float) -> ByteCode | None:
    low, high = quantizer.code_range
    # Signed codes move up by 128: with the first bit flipped, the byte is the signed code, and no zero-point is left.
    moved = 128 if quantizer.zero_point is None else 0
    zero = 128 if quantizer.zero_point is None else int(quantizer.zero_point)
    if not 0 <= zero <= 255:
        return None
    return ByteCode(UNIFORM, scale, zero, low + moved, high + moved, quantizer.bits, unit=scale)


def _regions(quantizer: ShiftedRegionsQuantizer, scale: float) -> ByteCode:
    small, large = np.arange(quantizer.small_max + 1), np.arange(quantizer.large_max + 1)
    below = -np.arange(quantizer.small_max, 0, -1) if quantizer.negative else small[:0]
    levels = np.concatenate([below, small << quantizer.shift_small, large << quantizer.shift_large])
    levels, unit = _reduced(levels, scale)
    return ByteCode(
        REGIONS, scale, 0, 0, 255, quantizer.bits, quantizer.shift_small, quantizer.shift_large, quantizer.negative,
        levels, unit,
    )  # fmt: skip


def _log2(quantizer: Log2Quantizer, scale: float) -> ByteCode | None:
    if quantizer.bits > _WIDEST_LOG2:
        return None
    zero = 2**quantizer.bits - 1
    levels, unit = _reduced(np.append(1 << np.arange(zero - 1, -1, -1), 0), scale / 2 ** (zero - 1))
    return ByteCode(LOG2, scale, bits=quantizer.bits, levels=levels, unit=unit)


def _codebook(quantizer: CodebookQuantizer, scale: float) -> ByteCode | None:
    if quantizer.bits > _WIDEST_CODEBOOK:
        return None
    return ByteCode(CODEBOOK, scale, quantizer.zero, bits=quantizer.bits, codes=quantizer.codes, unit=scale)


def _row_log(quantizer: RowLogQuantizer) -> ByteCode | None:
    if quantizer.bits > _WIDEST or quantizer.base.numel() != 1:
        return None
    levels = np.zeros(256, np.int64)
    levels[: 2**quantizer.bits] = quantizer.levels().long().cpu().numpy()
    return ByteCode(ROW_LOG, float(quantizer.base), bits=quantizer.bits, levels=levels)


def _reduced(levels: NDArray[np.int64], unit: float) -> tuple[NDArray[np.int64], float]:
    """Levels (256,) without the power of two that they share, and the unit that has it."""
    shared = int(np.bitwise_or.reduce(np.abs(levels)))
    shift = (shared & -shared).bit_length() - 1 if shared else 0
    table = np.zeros(256, np.int64)
    table[: len(levels)] = levels >> shift
    return table, unit * 2.0**shift
