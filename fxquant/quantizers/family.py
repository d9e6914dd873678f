"""What a quantizer family is: for a tensor's statistics and a width, the candidates worth trying, as level tables.

A family turns (statistics, bits) into `Proposals`: level and threshold tables of C candidates, and a builder that makes
the quantizer of the chosen one. The search (`fxquant.quantizers.search`) evaluates every table exactly, whatever the
family. A module of this package that makes a family ends in `FAMILIES = (Family(...), ...)`, and
`fxquant.quantizers.families` finds it there; docs/how_to/adding_a_family.md builds one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.statistics.histogram import Array, SortedMoments

STEPS = 100


@dataclass(frozen=True)
class Statistics:
    """What calibration learns of one activation.

    Args:
        moments: of its values (for O-2SF: divided by `channel_factor`; those of rows where no family asks for others).
        minimum, maximum: the smallest and the largest of all values.
        mean_image_minimum: mean over images of the image's minimum (OPT-m's x_low).
        channel_factor: float32 (channels,), powers of two, or None.
        coherence: see `SortedMoments.errors` and `passes.search.input_weights.coherence`.
        row_moments: of the values relative to the largest of their row, each counted with its square; None where no
            family asks for them.
        row_length: how many values a row of the tensor has.
    """

    moments: SortedMoments
    minimum: float
    maximum: float
    mean_image_minimum: float
    channel_factor: torch.Tensor | None = None
    coherence: float = 0.0
    row_moments: SortedMoments | None = None
    row_length: int = 0

    @property
    def largest_magnitude(self) -> float:
        """max |x|; never zero."""
        return max(abs(self.minimum), abs(self.maximum), 1e-12)


@dataclass(frozen=True)
class Proposals:
    """C candidates: ascending levels (C, L), decision thresholds (C, L-1) and the quantizer of candidate i.

    Args:
        levels: float64 (C, L), the levels of each candidate, ascending.
        thresholds: float64 (C, L - 1), the values at which one level gives way to the next.
        build: takes the index of a candidate and returns its quantizer.
    """

    levels: Array
    thresholds: Array
    build: Callable[[int], Quantizer]


@dataclass(frozen=True)
class Family:
    """A rule that proposes quantizers.

    Args:
        name: what recipes and options call it.
        propose: the candidates for a tensor's statistics at a width in bits.
        byte_bits: the widest width at which bytes hold its codes, and integer kernels read them; 0: it stays simulated.
            `fxquant.runtime.integer.byte_codes` says which quantizers have bytes.
        is_uniform: whether its bytes are levels as they are, so that every integer kernel reads them.
        of_rows: whether it asks for `Statistics.row_moments`, those of values relative to the largest of their row.
        by_channel: what makes `Statistics.channel_factor` of the channels' largest magnitudes, where it asks for that.
        coherent: whether errors of small values lie on one side, so that they do not average out: those of a table
            without a zero, and of one with a zero to which most values are rounded.
    """

    name: str
    propose: Callable[[Statistics, int], Proposals]
    byte_bits: int = 0
    is_uniform: bool = False
    of_rows: bool = False
    by_channel: Callable[[torch.Tensor], torch.Tensor] | None = None
    coherent: bool = False


def midpoints(levels: Array) -> Array:
    """Thresholds of nearest-level rounding."""
    return np.asarray((levels[:, 1:] + levels[:, :-1]) / 2)


def shrinking(largest: float) -> Array:
    """Candidates for the largest value represented, 60 from `largest` down to an eighth."""
    return np.asarray(largest * np.exp2(-np.arange(0, 3, 0.05)))


def scaled(
    relative_tl: Array, scales: Array, build: Callable[[float, int], Quantizer], offset: float = 0.0
) -> Proposals:
    """Every table of relative levels at every scale.

    Args:
        relative_tl: float64 (T, L), tables of levels for scale 1, each ascending.
        scales: the scales to try, float64 (S,).
        build: takes a scale and the index of a table and returns their quantizer.
        offset: what is subtracted from every level.
    """
    levels = (scales[:, None, None] * relative_tl - offset).reshape(-1, relative_tl.shape[1])
    tables = len(relative_tl)
    return Proposals(levels, midpoints(levels), lambda index: build(float(scales[index // tables]), index % tables))


def joined(tables: list[Proposals]) -> Proposals:
    """All candidates of tables with equally many levels."""
    levels = np.concatenate([table.levels for table in tables])
    thresholds = np.concatenate([table.thresholds for table in tables])
    owners = [(table, index) for table in tables for index in range(len(table.levels))]
    return Proposals(levels, thresholds, lambda index: owners[index][0].build(owners[index][1]))
