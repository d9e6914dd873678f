"""Interactions: whether the errors of two operands add up, cancel, or leave each other alone.

    r_ij = (D_ij - D_i - D_j) / (2 sqrt(D_i D_j))

D: divergence with operand i, j or both quantized. Were the divergence quadratic in their errors, r would be the
correlation of what these do to the output, whatever the widths; so one width is measured, of a sample of pairs.

It is not quite, and images are few: measured r need not belong to any quadratic form, and an allocator would spend
error on pairs that seem to cancel. So the matrix of r is brought to the nearest one without negative eigenvalues and
scaled back to a diagonal of 1: no combination of errors has a negative cost.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.graph.annotation import annotation_of
from fxquant.sensitivity.measured import Bits, Divergence

Place = tuple[Node, tuple[int, ...]]
"""A node and the indices of operands that share one width, a group of its annotation."""

Correlation = tuple[Place, Place, float]


def correlations(divergence: Divergence, operands: list[Place], bits: int, strongest: int) -> list[Correlation]:
    """(place, place, r in -1 to 1) of all pairs among the operands that cost most.

    Args:
        divergence: measures the network with operands at chosen widths.
        operands: those to choose from, each measured alone; of the `strongest` of them every pair is measured together.
        bits: the width that operands have while they are measured.
        strongest: how many of the operands are paired, those that cost most alone.

    Raises SensitivityError as `Divergence.of` does.
    """
    alone = divergence.of_each([_quantized(bits, place) for place in operands])
    order = sorted(range(len(operands)), key=alone.__getitem__, reverse=True)
    pairs = [(i, j) for i, j in itertools.combinations(order[:strongest], 2) if alone[i] > 0 and alone[j] > 0]
    together = divergence.of_each([_quantized(bits, operands[i], operands[j]) for i, j in pairs])
    measured = torch.eye(len(operands), dtype=torch.float64)
    for (i, j), value in zip(pairs, together, strict=True):
        r = (value - alone[i] - alone[j]) / (2 * math.sqrt(alone[i] * alone[j]))
        measured[i, j] = measured[j, i] = min(max(r, -1.0), 1.0)
    possible = nearest_correlation(measured)
    return [(operands[i], operands[j], float(possible[i, j])) for i, j in pairs]


def nearest_correlation(matrix_kk: Tensor) -> Tensor:
    """A symmetric float64 (K, K) of diagonal 1 without its negative eigenvalues, scaled to a diagonal of 1 again."""
    values, vectors = torch.linalg.eigh(matrix_kk)
    positive = (vectors * values.clamp_min(0)) @ vectors.T
    scale = positive.diagonal().clamp_min(1e-30).sqrt()
    possible: Tensor = (positive / scale / scale[:, None]).clamp(-1, 1)
    return possible


def _quantized(bits: int, *places: Place) -> dict[Node, Bits]:
    """These operands at this width; they may be of one node."""
    chosen: dict[Node, set[int]] = {}
    for node, indices in places:
        chosen.setdefault(node, set()).update(indices)
    return {
        node: tuple(bits if index in indices else None for index in range(len(annotation_of(node).operands)))
        for node, indices in chosen.items()
    }
