"""The outline of a tensor: a histogram of 40 bins, small enough that a file keeps one for every operand.

    height = 255 (1 + log10(n / n_max) / DECADES), at least 0    (n: how much lies in the bin, n_max: in the fullest)

Heights are logarithmic, because tails that hold one value in ten thousand decide how a tensor is quantized; a bin with
less than a millionth of the fullest has height 0. Not kept: the values, and how many there were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fxquant.checks.untrusted import LIST, NUMBER, checked, choice, listed, whole
from fxquant.errors import ArtefactError
from fxquant.quantizers.statistics.histogram import Array, SortedMoments

BINS: Final = 40
DECADES: Final = 6
_TALLEST: Final = 255
VALUE, ROW, CHANNEL = "value", "row", "channel"
"""What values are measured in: as they are; relative to the largest of their row; divided by their channel's factor."""


@dataclass(frozen=True)
class Outline:
    """A small histogram.

    Args:
        low, high: ends of the first and of the last bin.
        heights: of `BINS` bins, 0 to 255, logarithmic (see the module).
        unit: "value", "row" or "channel": what the values are measured in.
    """

    low: float
    high: float
    heights: tuple[int, ...]
    unit: str = VALUE

    @classmethod
    def of_moments(cls, moments: SortedMoments, unit: str = VALUE) -> Outline:
        """Of an activation, from what calibration has learned of it."""
        values = moments.values
        low, high = _ends(float(values[0]), float(values[-1]))
        counts, _ = np.histogram(values, BINS, (low, high), weights=moments.moments[0])
        return cls(low, high, _heights(counts), unit)

    @classmethod
    def of_tensor(cls, tensor: Tensor) -> Outline:
        """Of a float tensor of any shape, such as a weight."""
        flat = tensor.detach().float().flatten()
        low, high = _ends(float(flat.min()), float(flat.max()))
        return cls(low, high, _heights(torch.histc(flat, BINS, low, high).double().cpu().numpy()))

    def to_json(self) -> list[Any]:
        """Four JSON values: both ends, the unit, the heights."""
        return [float(f"{self.low:.5g}"), float(f"{self.high:.5g}"), self.unit, list(self.heights)]

    @classmethod
    def from_json(cls, values: Any, where: str) -> Outline:
        """What `to_json` gave. Raises ArtefactError, naming `where`, for anything else."""
        if len(checked(values, LIST, where)) != 4:
            raise ArtefactError(f"{where} is no histogram: it has {len(values)} fields, not 4")
        low, high, unit, heights = values
        ends = [checked(end, NUMBER, f"{where}: an end") for end in (low, high)]
        found = checked(heights, listed(whole(0, _TALLEST), longest=BINS), f"{where}: the heights")
        if len(found) != BINS or not ends[0] < ends[1]:
            raise ArtefactError(f"{where} is no histogram: {len(found)} bins from {low} to {high}")
        return cls(ends[0], ends[1], tuple(found), checked(unit, choice(VALUE, ROW, CHANNEL), f"{where}: the unit"))


def _ends(low: float, high: float) -> tuple[float, float]:
    """Ends that are apart, for a constant tensor too."""
    margin = max(abs(low), abs(high), 1e-6) * 1e-3
    return (low, high) if high - low > margin else (low - margin, high + margin)


def _heights(counts: Array) -> tuple[int, ...]:
    with np.errstate(divide="ignore"):
        relative = 1 + np.log10(counts / max(counts.max(), 1e-300)) / DECADES
    return tuple(np.rint(_TALLEST * relative.clip(0, 1)).astype(int).tolist())
