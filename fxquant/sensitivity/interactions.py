"""Interactions: whether the errors of two operands add up, cancel, or leave each other alone.

    r_ij = (D_ij - D_i - D_j) / (2 sqrt(D_i D_j))

D: divergence with operand i, j or both quantized. Were the divergence quadratic in their errors, r would be the
correlation of what these do to the output, whatever the widths; so one width is measured, of a sample of pairs.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

from torch.fx import Node

from fxquant.graph.annotation import annotation_of
from fxquant.sensitivity.measured import Bits, Divergence

Operand = tuple[Node, Literal["weight", "activation"]]
Correlation = tuple[tuple[str, str], tuple[str, str], float]


def correlations(divergence: Divergence, operands: list[Operand], bits: int, strongest: int) -> list[Correlation]:
    """((layer, operand), (layer, operand), r in -1 to 1) of all pairs among the operands that cost most.

    operands: those to choose from, each measured alone; of the `strongest` of them every pair is measured together.
    bits: width while measured. Raises SensitivityError as `Divergence.of` does.
    """
    alone = divergence.of_each([{node: _bits(name, bits)} for node, name in operands])
    order = sorted(range(len(operands)), key=alone.__getitem__, reverse=True)
    pairs = [(i, j) for i, j in itertools.combinations(order[:strongest], 2) if alone[i] > 0 and alone[j] > 0]
    together = divergence.of_each([_joined(operands[i], operands[j], bits) for i, j in pairs])
    found = []
    for (i, j), value in zip(pairs, together, strict=True):
        r = (value - alone[i] - alone[j]) / (2 * math.sqrt(alone[i] * alone[j]))
        found.append((_name(operands[i]), _name(operands[j]), min(max(r, -1.0), 1.0)))
    return found


def _bits(name: str, bits: int) -> Bits:
    return (bits, None) if name == "weight" else (None, bits)


def _joined(first: Operand, second: Operand, bits: int) -> dict[Node, Bits]:
    """Both operands at this width; they may be of one node."""
    if first[0] is second[0]:
        return {first[0]: (bits, bits)}
    return {node: _bits(name, bits) for node, name in (first, second)}


def _name(operand: Operand) -> tuple[str, str]:
    return annotation_of(operand[0]).layer, operand[1]
