"""Quantizer families: for a tensor's statistics and a width, the candidates worth trying, as level tables.

A family turns (statistics, bits) into `Proposals`: level and threshold tables of C candidates, and a builder that
makes the quantizer of the chosen one. The search (search.py) evaluates every table exactly, whatever the family, so a
new quantizer joins by giving its levels.

Sources: symmetric candidates, 100 equal steps of (0, 1.2 max|X| / 2^(b-1)] (MPTQ-ViT, section 4); OPT-m (eq. 6-8);
V-2SF and O-2SF (TSPTQ-ViT); log2 (FQ-ViT); log-sqrt2 (RepQ-ViT); AdaLog; codebooks (Lloyd; Max); row-log (ours,
`fxquant.quantizers.row_log`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fxquant.errors import PatternError
from fxquant.graph.annotation import Allowed
from fxquant.quantizers.adalog import BASES, GELU_SHIFT, AdaLogQuantizer, adalog_levels
from fxquant.quantizers.lloyd_max import book
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.log_sqrt2 import LogSqrt2Quantizer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.row_log import LARGEST, RowLogQuantizer
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer, magnitudes
from fxquant.quantizers.statistics.histogram import Array, SortedMoments
from fxquant.quantizers.uniform import UniformQuantizer

STEPS = 100
WIDEST_BITS = 8


@dataclass(frozen=True)
class Statistics:
    """What calibration learns of one activation.

    moments: of its values (for O-2SF: divided by `channel_factor`; those of rows where no family asks for others).
    minimum, maximum: over all values. mean_image_minimum: mean over images of the image's minimum (OPT-m's x_low).
    channel_factor: float32 (channels,), powers of two, or None. coherence: see `SortedMoments.errors` and
    `passes.search.calibrate.coherence`. row_moments: of the values relative to the largest of their row, each counted
    with its square; None where no family asks for them. row_length: values in a row.
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

    of_rows: levels are of values relative to the largest of their row.
    """

    levels: Array
    thresholds: Array
    build: Callable[[int], Quantizer]
    of_rows: bool = False


Family = Callable[[Statistics, int], Proposals]


def midpoints(levels: Array) -> Array:
    """Thresholds of nearest-level rounding."""
    return np.asarray((levels[:, 1:] + levels[:, :-1]) / 2)


def symmetric(statistics: Statistics, bits: int) -> Proposals:
    """Symmetric uniform, 100 scales."""
    scales = statistics.largest_magnitude * 1.2 / 2 ** (bits - 1) * np.arange(1, STEPS + 1) / STEPS
    levels = scales[:, None] * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))

    def build(index: int) -> Quantizer:
        scale = torch.tensor(scales[index], dtype=torch.float32)
        factor = statistics.channel_factor
        return UniformQuantizer(bits, scale if factor is None else scale * factor)

    return Proposals(levels, midpoints(levels), build)


def symmetric_min_max(statistics: Statistics, bits: int) -> Proposals:
    """Symmetric uniform, the scale that just covers the largest magnitude; nothing to search."""
    scales = np.array([statistics.largest_magnitude / (2 ** (bits - 1) - 1)])
    levels = scales[:, None] * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    return Proposals(levels, midpoints(levels), lambda index: UniformQuantizer(bits, float(scales[index])))


def asymmetric(statistics: Statistics, bits: int) -> Proposals:
    """Asymmetric uniform with an integer zero-point: both ends of the range shrink independently, 20 x 20 pairs."""
    shrink = np.linspace(0.05, 1.0, 20)
    low, high = np.meshgrid(min(statistics.minimum, 0.0) * shrink, max(statistics.maximum, 0.0) * shrink)
    top = 2**bits - 1
    scales = np.maximum(high - low, statistics.largest_magnitude * 1e-6).ravel() / top
    zeros = np.clip(np.rint(-low.ravel() / scales), 0, top)
    levels = scales[:, None] * (np.arange(top + 1) - zeros[:, None])
    return Proposals(
        levels, midpoints(levels), lambda index: UniformQuantizer(bits, float(scales[index]), int(zeros[index]))
    )


def opt_m(statistics: Statistics, bits: int) -> Proposals:
    """OPT-m: m1 from the range (eq. 7), every m0 < m1 (eq. 8) with 100 base scales each, chosen jointly.

    Where the largest value lies far above the 99.95th percentile (massive activations), the m1 that reaches it is tried
    as well: eq. 7 would clip it whatever the base scale.
    """
    x_up = max(statistics.moments.quantile(0.9995), 1e-12)
    small_max, large_max = magnitudes(bits, negative=True)
    x_low = min(statistics.mean_image_minimum, -1e-12)
    tables = []
    for top in (x_up, statistics.largest_magnitude):
        shift_large = min(max(round(math.log2((top / large_max) / (-x_low / max(small_max, 1)))), 1), 16)
        # The paper's (0, 1.2 max|X| / 2^(b-1)] steps are for a scale that covers the large region; s0 is 2^m1 finer.
        bases = statistics.largest_magnitude * 1.2 / 2 ** (bits - 1 + shift_large) * np.arange(1, STEPS + 1) / STEPS
        tables.append(_regions([(base, m0) for m0 in range(shift_large) for base in bases], shift_large, bits, True))
        if statistics.largest_magnitude < 4 * x_up:
            break
    return _joined(tables)


def twin_gelu(statistics: Statistics, bits: int) -> Proposals:
    """V-2SF post-GELU: a signed small region and a positive large one 2^3 coarser."""
    bases = statistics.largest_magnitude * 1.2 / 2 ** (bits - 1 + 3) * np.arange(1, STEPS + 1) / STEPS
    # Small tensors of large outliers want a base scale well above the covering one divided by 8.
    bases = np.concatenate([bases, bases * 8])
    return _regions([(base, 0) for base in bases], 3, bits, negative=True)


def twin_softmax(statistics: Statistics, bits: int) -> Proposals:
    """V-2SF post-Softmax: two unsigned regions, the large one 2^m coarser, m from 1 to 8 by search."""
    top = statistics.largest_magnitude / (2 ** (bits - 1) - 1)
    tables = []
    for shift in range(1, 9):
        bases = top / 2**shift * np.linspace(0.1, 1.2, STEPS // 4)
        tables.append(_regions([(base, 0) for base in bases], shift, bits, negative=False))
    return _joined(tables)


def log2(statistics: Statistics, bits: int) -> Proposals:
    """Powers of two below a searched largest value, and zero."""
    scales = _shrinking(statistics.largest_magnitude)
    zero = 2**bits - 1
    exponents = np.arange(zero - 1, -1, -1)
    levels = np.concatenate([np.zeros((len(scales), 1)), scales[:, None] * np.exp2(-exponents)], axis=1)
    thresholds = scales[:, None] * np.exp2(-(exponents + 0.5))
    return Proposals(levels, thresholds, lambda index: Log2Quantizer(bits, float(scales[index])))


def row_log(statistics: Statistics, bits: int) -> Proposals:
    """Powers of one base below the largest of each row, and zero, in whole 255ths; see `RowLogQuantizer`.

    The base follows from the widths, it is not searched: what the zero swallows has to weigh little with all keys of a
    row together, log2(keys) powers of two below the largest and one more from 4 bits on, as far as a byte reaches.
    A search by the predicted loss, which takes errors of a row for independent, stops one to two powers too early.
    """
    last = 2**bits - 1
    reach = min(math.log2(max(statistics.row_length, 2)) + min(bits, 4) / 2 - 1, 9.5)
    base = max(reach, 1.0) / (last - 0.5)
    exponents = base * np.arange(last - 1, -1, -1)
    levels = np.concatenate([[0.0], np.rint(LARGEST * np.exp2(-exponents)) / LARGEST])
    thresholds = np.exp2(-exponents - base / 2)
    return Proposals(levels[None], thresholds[None], lambda _: RowLogQuantizer(bits, base), of_rows=True)


def codebook(statistics: Statistics, bits: int) -> Proposals:
    """The levels of least weighted squared error, on a grid of bytes; nothing to search. See `CodebookQuantizer`."""
    found = book(statistics.moments, 2**bits)
    return Proposals(found.levels[None], found.thresholds[None], lambda _: found.quantizer(bits))


def log_sqrt2(statistics: Statistics, bits: int) -> Proposals:
    """Powers of sqrt(1/2) below a searched largest value, and zero."""
    relative = LogSqrt2Quantizer(bits, 1.0).relative_levels().double().numpy()
    return _scaled(
        relative[None], _shrinking(statistics.largest_magnitude), lambda scale, _: LogSqrt2Quantizer(bits, scale)
    )


def adalog_softmax(statistics: Statistics, bits: int) -> Proposals:
    """AdaLog post-Softmax: every base, below 1 (the published scale) and below the largest value seen."""
    relative = np.stack([adalog_levels(bits, base) for base in BASES])
    scales = np.array([statistics.largest_magnitude, 1.0])
    return _scaled(relative, scales, lambda scale, row: AdaLogQuantizer(bits, scale, BASES[row]))


def adalog_gelu(statistics: Statistics, bits: int) -> Proposals:
    """AdaLog post-GELU: values shifted to be positive; bases and scales jointly, fewer of both at higher widths."""
    thinning = max(1, 2 ** (bits - 5))
    bases = BASES[::thinning]
    relative = np.stack([adalog_levels(bits, base) for base in bases])
    scales = (max(statistics.maximum, 0.0) + GELU_SHIFT) * np.linspace(0.02, 1.0, STEPS // min(thinning, 4))
    return _scaled(relative, scales, lambda s, row: AdaLogQuantizer(bits, s, bases[row], GELU_SHIFT), GELU_SHIFT)


def _shrinking(largest: float) -> Array:
    """Candidates for the largest value represented, 60 from `largest` down to an eighth."""
    return np.asarray(largest * np.exp2(-np.arange(0, 3, 0.05)))


def _scaled(
    relative_tl: Array, scales: Array, build: Callable[[float, int], Quantizer], offset: float = 0.0
) -> Proposals:
    """Every table (T, L) of relative levels at every scale; `build` makes the quantizer of a scale and a table."""
    levels = (scales[:, None, None] * relative_tl - offset).reshape(-1, relative_tl.shape[1])
    tables = len(relative_tl)
    return Proposals(levels, midpoints(levels), lambda index: build(float(scales[index // tables]), index % tables))


def _joined(tables: list[Proposals]) -> Proposals:
    """All candidates of tables with equally many levels."""
    levels = np.concatenate([table.levels for table in tables])
    thresholds = np.concatenate([table.thresholds for table in tables])
    owners = [(table, index) for table in tables for index in range(len(table.levels))]
    return Proposals(levels, thresholds, lambda index: owners[index][0].build(owners[index][1]))


def _regions(pairs: list[tuple[float, int]], shift_large: int, bits: int, negative: bool) -> Proposals:
    small_max, large_max = magnitudes(bits, negative)
    bases = np.array([base for base, _ in pairs])
    steps = np.array([2.0**small for _, small in pairs])
    small = steps[:, None] * np.arange(0, small_max + 1)
    large = np.broadcast_to(2.0**shift_large * np.arange(0, large_max + 1), (len(pairs), large_max + 1))
    # Large levels below the small region's top are never used: the boundary lies above it.
    large = np.where(large > small[:, -1:], large, small[:, -1:])
    below = np.broadcast_to(np.arange(-small_max, 0.0), (len(pairs), small_max)) if negative else small[:, :0]
    levels = bases[:, None] * np.concatenate([below, small, large], axis=1)

    def build(index: int) -> Quantizer:
        base, shift_small = pairs[index]
        return ShiftedRegionsQuantizer(bits, float(base), shift_small, shift_large, negative)

    return Proposals(levels, midpoints(levels), build)


FAMILIES: dict[str, Family] = {
    "symmetric": symmetric,
    "symmetric-min-max": symmetric_min_max,
    "asymmetric": asymmetric,
    "opt-m": opt_m,
    "twin-gelu": twin_gelu,
    "twin-softmax": twin_softmax,
    "log2": log2,
    "row-log": row_log,
    "codebook": codebook,
    "log-sqrt2": log_sqrt2,
    "adalog-softmax": adalog_softmax,
    "adalog-gelu": adalog_gelu,
    "o-2sf": symmetric,
}

OF_ROWS = frozenset({"row-log"})
"""Families that ask for `Statistics.row_moments`."""


def families_named(text: str) -> tuple[Allowed, ...]:
    """`"log2<=4|twin-softmax"` as names and limits, 8 bits where there is none. Raises PatternError for others."""
    found = []
    for part in text.split("|"):
        name, _, widest = part.partition("<=")
        if name not in FAMILIES:
            raise PatternError(f"no quantizer family is called {name!r}; there are {', '.join(FAMILIES)}")
        if "<=" in part and widest not in map(str, range(1, WIDEST_BITS + 1)):
            raise PatternError(f"a family's widest width is a number of bits, such as log2<=4; found {part!r}")
        found.append(Allowed(name, int(widest or WIDEST_BITS)))
    return tuple(found)


def text_of(families: Sequence[Allowed]) -> str:
    """What `families_named` reads back."""
    limits = ("" if family.widest_bits == WIDEST_BITS else f"<={family.widest_bits}" for family in families)
    return "|".join(family.name + limit for family, limit in zip(families, limits, strict=True))
