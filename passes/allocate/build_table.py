"""build_table: the allocation problem of annotated nodes, as an allocator sees it.

    cost(b) = sum over operands that share a width of score(b)    (without a score: the predicted loss of the candidate)

Needs a plan only: before scales are searched, costs are zero, and the table says what a budget can be met with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from allocators.problem.arrays import FloatArray
from allocators.problem.cost_table import CostTable
from allocators.problem.usage import FLOAT_BITS
from fxquant.errors import OverrideError
from fxquant.graph.annotation import Annotation, Operand, Source

Group = tuple[Operand, ...]
"""Operands that share one width; none: an absent one."""


def build_table(annotations: Sequence[Annotation], bits: tuple[int, ...], image_bits: int) -> CostTable:
    """The table of these nodes without any override.

    Args:
        annotations: of nodes that are to be quantized.
        bits: candidate widths; the candidates of an operand, where it has some, are of these widths.
        image_bits: width of images, which are outside the allocation.
    """
    groups = [[_operands(annotation, row) for annotation in annotations] for row in (0, 1)]
    scores = [[_scores(group, len(bits)) for group in row] for row in groups]
    return CostTable(
        layers=tuple(annotation.layer for annotation in annotations),
        roles=tuple(str(annotation.role) for annotation in annotations),
        elements=np.array([[_elements(group) for group in row] for row in groups]),
        macs=np.array([annotation.macs for annotation in annotations]),
        bits=bits,
        cost=np.array([[costs for costs, _ in row] for row in scores]),
        sqnr_db=np.array([[sqnr_db for _, sqnr_db in row] for row in scores]),
        allowed=np.array([[_within(group, bits) for group in row] for row in groups]),
        tied=np.array([any(operand.tied for operand in annotation.operands) for annotation in annotations]),
        fixed_bits=np.array([[image_bits if _is_image(group) else FLOAT_BITS for group in row] for row in groups]),
    )


def refuse_too_wide(pinned: CostTable, free: CostTable) -> None:
    """Raise OverrideError where overrides have pinned an operand above the widths that its families have."""
    for row, layer, column in np.argwhere(pinned.allowed & ~free.allowed)[:1]:
        widest = free.bits[int(np.flatnonzero(free.allowed[row, layer])[-1])]
        raise OverrideError(
            f"{pinned.operand(row, layer)!r} is pinned at {pinned.bits[column]} bits, and its quantizers end at "
            f"{widest}: pin it lower, or allow other families or another backend"
        )


def latency_ms(table: CostTable, measured: Mapping[str, Any]) -> FloatArray:
    """MeasureLatency's times, ms, as float64 [L, C, C]; what no width changes counts with the first layer."""
    found = np.zeros((len(table.layers), len(table.bits), len(table.bits)))
    for layer, times in measured["layers"].items():
        found[table.layers.index(layer)] = times
    found[0] += measured["rest_ms"]
    return found


def _operands(annotation: Annotation, row: int) -> Group:
    return tuple(annotation.operands[index] for index in annotation.groups[row])


def _quantized(group: Group) -> Group:
    return tuple(operand for operand in group if operand.families)


def _is_image(group: Group) -> bool:
    return any(operand.source is Source.IMAGE for operand in _quantized(group))


def _elements(group: Group) -> int:
    """Elements that the allocation counts: not an image's, nor those of operands that stay float."""
    return sum(operand.elements for operand in group) if _quantized(group) and not _is_image(group) else 0


def _within(group: Group, bits: tuple[int, ...]) -> list[bool]:
    """The widths that all of these operands have a family for."""
    widest = min((operand.widest_bits for operand in _quantized(group)), default=bits[-1])
    return [width <= widest for width in bits]


def _scores(group: Group, count: int) -> tuple[list[float], list[float]]:
    """Cost and joint SQNR in dB of operands that share one width, for each of `count` widths."""
    found = [operand for operand in group if operand.candidates]
    if not found:
        return [0.0] * count, [0.0] * count
    costs, sqnr_db = [], []
    for column in range(count):
        chosen = [operand.candidates[column] for operand in found]
        costs.append(sum(o.scores[column] if o.scores else o.candidates[column].loss for o in found))
        # Operands differ in scale, so each counts by its own ratio; their mean noise-to-signal ratio is the group's.
        ratio = float(np.mean([candidate.noise_ratio for candidate in chosen]))
        sqnr_db.append(-10 * math.log10(max(ratio, 1e-30)))
    return costs, sqnr_db
