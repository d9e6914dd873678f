"""Levels of least squared error for values with weights (Lloyd, 1957; Max, 1960), from streamed moments.

Every level is the weighted mean of the values it stands for, every threshold lies midway between two levels. An
iteration needs only prefix sums at the thresholds, whatever the number of values. It starts where levels lie as dense
as the cube root of the values' weighted density (Panter and Dite), which is the optimum for many levels.
"""

from __future__ import annotations

import numpy as np

from fxquant.quantizers.codebook import LARGEST, Book, proposed
from fxquant.quantizers.family import Family, Proposals, Statistics
from fxquant.quantizers.statistics.histogram import Array, SortedMoments

ROUNDS = 40


def book(moments: SortedMoments, count: int) -> Book:
    """The best levels, at most `count`, as codes of the grid that reaches from the lowest to the highest, and to 0."""
    levels = lloyd_max(moments, companded(moments, count))
    low, high = min(float(levels[0]), 0.0), max(float(levels[-1]), 0.0)
    scale = max(high - low, 1e-30) / LARGEST
    zero = int(np.rint(-low / scale))
    return Book(scale, zero, np.unique(np.clip(np.rint(levels / scale) + zero, 0, LARGEST)).astype(np.int64))


def companded(moments: SortedMoments, count: int) -> Array:
    """Ascending levels (count,), as dense as the cube root of the density of values."""
    values = moments.values
    edges = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2, values[-1:]])
    mass = np.cbrt(_weights(moments)[0]) * np.cbrt(np.diff(edges)) ** 2
    total = np.concatenate([[0.0], np.cumsum(mass)])
    return np.asarray(np.interp((np.arange(count) + 0.5) / count * total[-1], total, edges))


def lloyd_max(moments: SortedMoments, levels: Array) -> Array:
    """Ascending levels after `ROUNDS` of Lloyd's iteration; a level that no value takes stays where it is."""
    values = moments.values
    prefix = np.concatenate([np.zeros((2, 1)), np.cumsum(_weights(moments), axis=1)], axis=1)
    for _ in range(ROUNDS):
        cuts = np.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        mass, first = np.diff(prefix[:, np.concatenate([[0], cuts, [len(values)]])], axis=1)
        levels = np.sort(np.where(mass > 0, first / np.maximum(mass, 1e-300), levels))
    return levels


def _weights(moments: SortedMoments) -> Array:
    """Weight and weighted sum of every bucket, (2, buckets); counts where there are no weights."""
    has_weights = moments.weighted and bool(moments.moments[3].any())
    return moments.moments[3:5] if has_weights else moments.moments[:2]


def codebook(statistics: Statistics, bits: int) -> Proposals:
    """The levels of least weighted squared error, on a grid of bytes; nothing to search. See `CodebookQuantizer`."""
    return proposed([book(statistics.moments, 2**bits)], bits)


FAMILIES = (Family("codebook", codebook, byte_bits=5),)
