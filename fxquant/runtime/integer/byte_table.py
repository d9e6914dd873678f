"""From 14-bit codes to bytes by a table: what follows a linear layer, any function and any quantizer, is looked up.

The upper 6 bits of the code find an entry, the lower byte decides between the few results that entry has. The functions
at hand change slowly, so a handful of results is enough, and 64 codes are looked up at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.native import operators
from fxquant.runtime.native.library import MAX_STEPS

BITS = 14
_ROW = 1 << (BITS - 8)


@dataclass(frozen=True)
class ByteTable:
    """A function of one value, tabulated.

    Args:
        scale, zero: of the asymmetric 14-bit quantizer of x.
        entries: uint8 (1 + 2 steps, 64), see the C header.
    """

    scale: float
    zero: int
    entries: Tensor = field(compare=False)

    @property
    def steps(self) -> int:
        """How many times at most the result changes between two entries."""
        return len(self.entries) // 2


def fits(codes: Tensor) -> bool:
    """Whether a table holds these codes (16,384,) of all entries, or (64, 256)."""
    return int(_changes(codes.reshape(_ROW, 256)).sum(1).max()) <= MAX_STEPS


def byte_table(source: Quantizer, function: nn.Module, code: ByteCode) -> ByteTable | None:
    """Bytes of `code` of function(x), x by the codes of `source`; None where they change too often.

    Args:
        source: the quantizer whose codes are the input.
        function: the function, applied to one value at a time.
        code: how the result is bytes.
    """
    if not isinstance(source, UniformQuantizer) or source.zero_point is None or source.scale.numel() != 1:
        return None
    if source.bits != BITS:
        return None
    x = source.dequantize(torch.arange(1 << BITS, dtype=torch.int32))
    found = operators.quantize(function(x), operators.spec_tensor(code.quantizer_spec())).reshape(_ROW, 256)
    if not fits(found):
        return None
    changes = _changes(found)
    steps = max(1, int(changes.sum(1).max()))
    entries = torch.full((1 + 2 * steps, _ROW), 255, dtype=torch.uint8)
    entries[0] = found[:, 0]
    entries[2::2] = found[:, -1]  # a step that is not needed ends where the last one does
    upper, position = torch.nonzero(changes, as_tuple=True)
    index = torch.cumsum(changes, 1)[upper, position] - 1
    entries[1 + 2 * index, upper] = (position + 1).to(torch.uint8)
    entries[2 + 2 * index, upper] = found[upper, position + 1]
    return ByteTable(float(source.scale), int(source.zero_point), entries.contiguous())


def _changes(rows: Tensor) -> Tensor:
    """Where a row's codes (64, 256) differ from the ones before, bool (64, 255)."""
    return rows[:, 1:] != rows[:, :-1]
