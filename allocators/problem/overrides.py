"""Overrides by layer name, role or glob: each operand matched keeps one allowed width.

    {"head": 8, "fc1": (4, 5), "blocks.*.attn.av": 6, "blocks.3.attn.av.left": 2}

A layer's name, a role or a glob stands for both operands; with ".left" or ".right" for one input of a product.
Deliberately not done: ranges of widths; mask the table itself for that.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from allocators.problem.arrays import BoolArray
from allocators.problem.operands import ROWS
from fxquant.errors import OverrideError

if TYPE_CHECKING:
    from allocators.problem.operands import Side

Bits = int | tuple[int | None, int | None]
"""Bits of all operands, or (weight bits, activation bits) where `None` leaves an operand as it is."""

_INPUTS = ("left", "right")


def restrict(
    layers: Sequence[str], roles: Sequence[str], sides: Sequence[Side], patterns: Mapping[str, Bits]
) -> list[BoolArray]:
    """The `allowed` masks of both operands after every override, in order.

    Args:
        layers: names.
        roles: of these layers.
        sides: the first operands and the second ones.
        patterns: see `CostTable.override`.

    Raises:
        OverrideError: a pattern matches nothing, or a width is not a candidate.
    """
    masks = [side.allowed.copy() for side in sides]
    for pattern, bits in patterns.items():
        matched = _named(pattern, layers, roles)
        wanted = (
            _of_layers(pattern, matched, sides, bits) if matched else _of_inputs(pattern, layers, roles, sides, bits)
        )
        for row, layer, width in wanted:
            masks[row][layer] = sides[row].bits == width
    return masks


Wanted = list[tuple[int, int, int]]
"""(row, layer, width) of every operand that an override pins."""


def _of_layers(pattern: str, matched: Sequence[int], sides: Sequence[Side], bits: Bits) -> Wanted:
    """What an override of whole layers pins: their weights at the first of a pair, their inputs at the second."""
    pair = bits if isinstance(bits, tuple) else (bits, bits)
    if len(pair) != 2:
        raise OverrideError(f"override {pattern!r} must give bits or (weight bits, activation bits), found {bits!r}")
    operands = [(row, layer) for row in (0, 1) for layer in matched if sides[row].elements[layer] > 0]
    found: Wanted = []
    for kind, width in zip(("weight", "activation"), pair, strict=True):
        present = [(r, layer) for r, layer in operands if (sides[r].places[layer] == "weight") == (kind == "weight")]
        if width is None or (not present and not isinstance(bits, tuple)):
            continue
        if not present:
            raise OverrideError(f"override {pattern!r} sets {kind} bits, but no matched layer has {kind}s")
        found += [(row, layer, _candidate(pattern, sides[row], kind, width)) for row, layer in present]
    return found


def _of_inputs(pattern: str, layers: Sequence[str], roles: Sequence[str], sides: Sequence[Side], bits: Bits) -> Wanted:
    """What an override of one input of products pins. Raises OverrideError where there is none of this name."""
    name, _, place = pattern.rpartition(".")
    matched = _named(name, layers, roles) if name else []
    if len({roles[layer] for layer in matched}) == 1 and place not in _INPUTS:
        raise OverrideError(
            f"override {pattern!r} names no operand of {layers[matched[0]]!r}: one input of a product is named "
            f'"{name}.left" or "{name}.right", and a weight by a pair, {{"{name}": (4, None)}}'
        )
    if not matched or place not in _INPUTS:
        known = list(dict.fromkeys([*roles, *layers, *_inputs(layers, sides)]))
        close = difflib.get_close_matches(pattern, known, n=5, cutoff=0.4) or known[:5]
        raise OverrideError(f"override {pattern!r} matches no layer, role or glob; close names: {', '.join(close)}")
    side = sides[ROWS[place]]
    found = [layer for layer in matched if side.places[layer] == place and side.elements[layer] > 0]
    if not found:
        raise OverrideError(
            f"override {pattern!r} names one input of {layers[matched[0]]!r}, which has no width of its own: name the "
            f"layer, or give products' inputs widths of their own, PlanOperands(tied=())"
        )
    if isinstance(bits, tuple):
        raise OverrideError(f"override {pattern!r} names one operand and must give one width, found {bits!r}")
    return [(ROWS[place], layer, _candidate(pattern, side, place, bits)) for layer in found]


def _inputs(layers: Sequence[str], sides: Sequence[Side]) -> list[str]:
    """Names of the inputs that have a width of their own."""
    pairs = [(layer, side.places[index]) for side in sides for index, layer in enumerate(layers)]
    return [f"{layer}.{place}" for layer, place in pairs if place in _INPUTS]


def _named(pattern: str, layers: Sequence[str], roles: Sequence[str]) -> list[int]:
    """The layers a pattern names: an exact name first, then a role, then a glob."""
    if pattern in layers:
        return [layers.index(pattern)]
    by_role = [index for index, role in enumerate(roles) if role == pattern]
    return by_role or [index for index, layer in enumerate(layers) if fnmatchcase(layer, pattern)]


def _candidate(pattern: str, side: Side, kind: str, width: int) -> int:
    """`width`, if it is one of the candidates."""
    if isinstance(width, bool) or width not in side.bits.tolist():
        raise OverrideError(
            f"override {pattern!r} asks for {width!r} {kind} bits; the candidates are {side.bits.tolist()}"
        )
    return width
