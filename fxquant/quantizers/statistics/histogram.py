"""A streaming histogram keyed by a value's bfloat16 bits that keeps moments, so quantization error is exact.

Every value falls into one of 65,536 buckets; each bucket keeps the count, sum and sum of squares of its values, once
plain and once weighted (w = how much the model's loss cares). For any set of levels the error

    sum w (x - level(x))^2 = sum over levels of  S2 - 2 level S1 + level^2 S0

needs only prefix sums of these moments at the decision thresholds: the cost of a candidate does not depend on how
many activations were seen, no activation is stored, and the result is exact except for values that share a bucket
with a threshold (a relative width of 2^-8).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BUCKETS = 65536
CHUNK = 1 << 15  # values that are added together, so that what is made of them stays in the processor's cache
Array = NDArray[np.float64]


class Bfloat16Histogram:
    """Accumulates values and, optionally, weights; `finish` gives the sorted moments.

    Kept are the buckets that hold values, in general some thousands: a model has a hundred histograms.

    device: where the values are.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._keys = torch.zeros(0, dtype=torch.int64, device=device)
        self._moments = torch.zeros(6, 0, dtype=torch.float64, device=device)
        self.weighted = False

    def update(self, x: Tensor, weight: Tensor | None = None, mass: Tensor | None = None) -> None:
        """Add values x (float, any shape) with non-negative weights of the same shape.

        Args:
            x: values to add, a float tensor of any shape.
            weight: non-negative weights of the values, of the same shape; None: no weighted moments are gathered.
            mass: how often each value counts in the plain moments, same shape; None: once.
        """
        size = CHUNK if x.device.type == "cpu" else max(x.numel(), 1)
        parts, masses, weights = (
            () if t is None else torch.split(t.detach().reshape(-1), size) for t in (x, mass, weight)
        )
        # How many values each bucket has, and their six moments.
        sums = torch.zeros(7, BUCKETS, dtype=torch.float64, device=x.device)
        for number, part in enumerate(parts):
            keys = part.to(torch.bfloat16).view(torch.int16).to(torch.int64).bitwise_and_(0xFFFF)
            values, ones = part.double(), sums.new_ones(1).expand(len(part))
            plain = _times_powers(masses[number], values) if masses else (values, values * values)
            weighted = _times_powers(weights[number], values) if weights else ()
            rows = (sums[0], *sums[4 - len(plain) :])
            for row, summand in zip(rows, (ones, *plain, *weighted), strict=False):
                row.scatter_add_(0, keys, summand)  # torch.bincount first looks for the least and the largest key
        if not masses:
            sums[1] = sums[0]
        self.weighted = self.weighted or bool(weights)
        self._make_room(sums[0] > 0)
        self._moments += sums[1:, self._keys]

    def _make_room(self, occupied: Tensor) -> None:
        """Let every bucket that is occupied, bool (65536,), have a column of the moments."""
        occupied[self._keys] = True
        keys = occupied.nonzero()[:, 0]
        if len(keys) > len(self._keys):
            moments = self._moments.new_zeros(6, len(keys))
            moments[:, torch.searchsorted(keys, self._keys)] = self._moments
            self._keys, self._moments = keys, moments

    def state(self) -> dict[str, Tensor]:
        """The buckets that hold values, int64 (K,), their moments, float64 (6, K), and whether there are weights."""
        return {"used": self._keys, "moments": self._moments.clone(), "weighted": torch.tensor(self.weighted)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state, whose tensors change from then on."""
        self._keys, self._moments = state["used"], state["moments"]
        self.weighted = bool(state["weighted"])

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the values of another histogram, given by its state."""
        keys = state["used"]
        places = torch.searchsorted(self._keys, keys)
        if not len(self._keys) or not torch.equal(self._keys[places.clamp_max(len(self._keys) - 1)], keys):
            occupied = torch.zeros(BUCKETS, dtype=torch.bool, device=keys.device)
            occupied[keys] = True
            self._make_room(occupied)
            places = torch.searchsorted(self._keys, keys)
        self._moments.index_add_(1, places, state["moments"])
        self.weighted = self.weighted or bool(state["weighted"])

    def finish(self) -> SortedMoments:
        """Buckets that hold values, in ascending order of value: what is searched next, on the host."""
        moments = self._moments.cpu().numpy()
        used = np.flatnonzero(moments[0])
        used = used[np.argsort(moments[1, used] / moments[0, used])]
        return SortedMoments(np.ascontiguousarray(moments[:, used]), self.weighted)


def _times_powers(weight: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w, w x and w x^2, float64."""
    weights = weight.detach().reshape(-1).double()
    first = weights * values
    return weights, first, first * values


@dataclass(frozen=True)
class SortedMoments:
    """Moments of occupied buckets in ascending order: rows n, sum x, sum x^2, w, sum w x, sum w x^2 (6, buckets)."""

    moments: Array
    weighted: bool

    @property
    def values(self) -> Array:
        """Mean value of each bucket, ascending."""
        return np.asarray(self.moments[1] / self.moments[0])

    @property
    def count(self) -> float:
        """Number of values seen."""
        return float(self.moments[0].sum())

    @property
    def signal(self) -> float:
        """Sum of squares of all values."""
        return float(self.moments[2].sum())

    def quantile(self, fraction: float) -> float:
        """Value below which this fraction of all values lies (to the bucket)."""
        cumulative = np.cumsum(self.moments[0])
        return float(self.values[np.searchsorted(cumulative, fraction * cumulative[-1])])

    def errors(self, levels_cl: Array, thresholds_ck: Array, coherence: float = 0.0) -> tuple[Array, Array]:
        """Plain and weighted sum of squared errors of C candidates with L ascending levels and L-1 thresholds each.

        Args:
            levels_cl: float64 (C, L), levels of each candidate, ascending.
            thresholds_ck: float64 (C, L - 1), thresholds between these levels.
            coherence: how much more a mean error costs than independent ones of the same size; coherence * (sum w e)^2
                / sum w is added to the weighted sum.

        Returns two float64 arrays (C,): plain; weighted (plain when no weights were given).
        """
        prefix = np.concatenate([np.zeros((6, 1)), np.cumsum(self.moments, axis=1)], axis=1)
        cuts = np.searchsorted(self.values, thresholds_ck)
        ends = np.concatenate([cuts, np.full((len(cuts), 1), self.moments.shape[1])], axis=1)
        starts = np.concatenate([np.zeros((len(cuts), 1), dtype=ends.dtype), cuts], axis=1)
        plain = _error(prefix[:3], starts, ends, levels_cl)
        return plain, _error(prefix[3 if self.weighted else 0 :], starts, ends, levels_cl, coherence)


def _error(
    prefix: Array, starts: NDArray[np.intp], ends: NDArray[np.intp], levels: Array, coherence: float = 0.0
) -> Array:
    zeroth, first, second = (row[ends] - row[starts] for row in prefix[:3])
    terms = second - 2 * levels * first + levels**2 * zeroth
    total = terms.sum(axis=1).clip(min=0)
    if coherence:
        total += coherence * (first - levels * zeroth).sum(axis=1) ** 2 / max(prefix[0, -1], 1e-300)
    return np.asarray(total)
