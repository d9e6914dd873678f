"""The levels that fit a tensor best: 2^b of the 256 codes of an 8-bit grid (Lloyd-Max).

    f = clamp(round(x / s) + z, 0, 255),   x^ = s (c_k - z),   c_k the code nearest to f of the book c_0 < c_1 < ...

A uniform grid is right for uniform values. What a ViT multiplies is dense near zero and has tails, and each tensor has
its own; the least squared error at a given number of levels has every level at the mean of the values it stands for
and every threshold midway between two levels (Lloyd; Max). Levels are whole steps of one grid of bytes, so an integer
product reads them as it reads 8-bit codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxquant.checks.untrusted import Rule, listed, whole
from fxquant.quantizers.family import Proposals
from fxquant.quantizers.level_table import LevelTableQuantizer
from fxquant.quantizers.statistics.histogram import Array

LARGEST = 255  # code of the grid


class CodebookQuantizer(LevelTableQuantizer):
    """Nearest of at most 2^bits codes of an 8-bit grid; of two that are equally near the lower.

    Args:
        bits: width; the book has at most 2^bits codes.
        scale: what one step of the 8-bit grid is worth, s; float32 ().
        zero: the grid's code that stands for zero, 0 to 255.
        codes: the grid's codes that the book has, ascending, 0 to 255.
    """

    kind = "codebook"
    rules: ClassVar[Mapping[str, Rule] | None] = {
        "zero": whole(0, LARGEST),
        "codes": listed(whole(0, LARGEST), longest=LARGEST + 1),
    }

    def __init__(self, bits: int, scale: Tensor | float, zero: int, codes: Sequence[int]) -> None:
        super().__init__(bits, scale)
        self.zero, self.codes = int(zero), tuple(int(code) for code in codes)
        if not 0 <= self.zero <= LARGEST:
            raise ValueError(f"the code of zero is 0 to {LARGEST}, not {zero}")
        is_ascending = all(a < b for a, b in zip(self.codes, self.codes[1:], strict=False))
        if not (0 < len(self.codes) <= 2**bits and is_ascending and 0 <= self.codes[0] <= self.codes[-1] <= LARGEST):
            raise ValueError(f"a codebook of {bits} bits has 1 to {2**bits} ascending codes of 0 to {LARGEST}: {codes}")
        # Which level every code of the grid takes. From numpy: in a file is neither, so where quantizers are rebuilt
        # on the meta device, to take their tensors from a file, these two must be there already.
        levels = np.array(self.codes, dtype=np.int64)
        index = np.searchsorted(last_below(levels), np.arange(LARGEST + 1))
        self.index: Tensor
        self.relative: Tensor
        self.register_buffer("index", torch.from_numpy(index.astype(np.int32)), persistent=False)
        relative = torch.from_numpy((levels[index] - self.zero).astype(np.float32))
        self.register_buffer("relative", relative, persistent=False)

    def relative_levels(self) -> Tensor:
        """Codes counted from that of zero, float32 (L,)."""
        return torch.tensor(self.codes, dtype=torch.float32) - self.zero

    def quantize(self, x: Tensor) -> Tensor:
        """Index of the level, int32."""
        return self.index.index_select(0, self._fine(x).flatten()).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Same values as quantize then dequantize, in one lookup."""
        table = (self.relative * self.scale).to(x.dtype)
        return table.index_select(0, self._fine(x).flatten()).reshape(x.shape)

    def _fine(self, x: Tensor) -> Tensor:
        units = (x.float() * (1 / self.scale)).round_().clamp_(-self.zero, LARGEST - self.zero)
        return units.to(torch.int32).add_(self.zero)

    def settings(self) -> dict[str, Any]:
        """Kind, bits, code of zero and the book."""
        return {**super().settings(), "zero": self.zero, "codes": list(self.codes)}

    @classmethod
    def empty(cls, **arguments: Any) -> CodebookQuantizer:
        """From bits, code of zero and the book."""
        codes = arguments["codes"]
        if not isinstance(codes, list) or not all(type(code) is int for code in codes):
            raise ValueError("the codes of a codebook are a list of whole numbers")
        return cls(int(arguments["bits"]), 1.0, int(arguments["zero"]), codes)


def last_below(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of ascending codes (L,) the last code of the grid that each but the last stands for, (L-1,)."""
    return np.asarray((codes[1:] + codes[:-1]) // 2)


@dataclass(frozen=True)
class Book:
    """A grid of bytes and the codes chosen of it; the value of a code c is scale (c - zero).

    Args:
        scale: what one step of the grid is worth, above 0.
        zero: the grid's byte that stands for the value 0, from 0 to 255.
        codes: int64 (L,), the chosen bytes of the grid, ascending.
    """

    scale: float
    zero: int
    codes: NDArray[np.int64]

    def quantizer(self, bits: int) -> CodebookQuantizer:
        """The quantizer that it is."""
        return CodebookQuantizer(bits, self.scale, self.zero, self.codes.tolist())

    @property
    def levels(self) -> Array:
        """Values of the codes."""
        return np.asarray(self.scale * (self.codes - self.zero), dtype=np.float64)

    @property
    def thresholds(self) -> Array:
        """Where one level gives way to the next: half a step above the last code of the lower one."""
        return np.asarray(self.scale * (last_below(self.codes) + 0.5 - self.zero))


def proposed(books: Sequence[Book], bits: int) -> Proposals:
    """Books with equally many codes as the candidates of a family, each with the thresholds of its quantizer."""
    levels, thresholds = (np.stack(tables) for tables in zip(*((b.levels, b.thresholds) for b in books), strict=True))
    return Proposals(levels, thresholds, lambda index: books[index].quantizer(bits))
