"""The levels of any quantizer, found by asking it: what it returns for values of every magnitude.

A weight's quantizer has a scale a row, O-2SF's one a channel: then the levels are those of the row, or channel, of
median reach. Levels of row-log are relative to the largest of a row. Not done: levels of quantizers of more than
`MOST_BITS` bits, whose 64 and more nobody can tell apart in a picture.
"""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import Tensor

from fxquant.graph.nodes import device_of
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.row_log import LARGEST, RowLogQuantizer

MOST_BITS: Final = 5
_OCTAVES, _STEPS = range(-24, 16), 64  # magnitudes asked for, and how many in each power of two


def levels_of(quantizer: Quantizer, *, of_weight: bool = False) -> tuple[float, ...]:
    """The values it returns, ascending; the least and the largest alone above `MOST_BITS` bits.

    of_weight: whether its scales are of rows (first dimension), as a weight's are, and not of channels (the last one).
    """
    if isinstance(quantizer, RowLogQuantizer):
        returned = quantizer.levels() / LARGEST
    else:
        scale = getattr(quantizer, "scale", None)
        returned = _median(quantizer, _asked().to(device_of(quantizer)), scale, of_weight)
    found: Tensor = torch.unique(returned)
    if quantizer.bits > MOST_BITS or len(found) > 2**MOST_BITS:
        found = found[[0, -1]]
    return tuple(found.tolist())


def _asked() -> Tensor:
    """Zero and magnitudes of either sign, float32."""
    exponents = torch.arange(_OCTAVES.start * _STEPS, _OCTAVES.stop * _STEPS) / _STEPS
    magnitudes = torch.exp2(exponents)
    return torch.cat([-magnitudes, torch.zeros(1), magnitudes])


@torch.no_grad()
def _median(quantizer: Quantizer, asked: Tensor, scale: Tensor | None, of_weight: bool) -> Tensor:
    """What the quantizer returns for these values, in the row or channel of median reach where it has several."""
    if scale is None or scale.numel() == 1:
        return quantizer(asked)  # type: ignore[no-any-return]
    count = scale.numel()
    # Asked of all rows, all values would take more memory than the weight.
    ends = asked[[0, -1]].expand(count, -1)
    returned = quantizer(ends) if of_weight else quantizer(ends.T).T
    middle = int(returned.abs().amax(1).argsort()[count // 2])
    alone = copy.deepcopy(quantizer)
    for name, tensor in quantizer.named_buffers():
        if tensor.numel() == count:
            setattr(alone, name, tensor.flatten()[middle])
    return alone(asked)  # type: ignore[no-any-return]
