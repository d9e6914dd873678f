"""Overrides by layer name, role or glob: each matched layer keeps one allowed width.

Deliberately not done: ranges of widths; mask the table itself for that.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from allocators.problem.arrays import BoolArray
from fxquant.errors import OverrideError

if TYPE_CHECKING:
    from allocators.problem.operands import Operand

Bits = int | tuple[int | None, int | None]
"""Bits of both operands, or (weight bits, activation bits) where `None` leaves an operand as it is."""


def restrict(
    layers: Sequence[str], roles: Sequence[str], operands: Sequence[Operand], patterns: Mapping[str, Bits]
) -> list[BoolArray]:
    """The `allowed` masks of both operands after every override, in order.

    Raises:
        OverrideError: a pattern matches nothing, or a width is not a candidate.
    """
    masks = [operand.allowed.copy() for operand in operands]
    for pattern, bits in patterns.items():
        matched = _matches(pattern, layers, roles)
        pair = bits if isinstance(bits, tuple) else (bits, bits)
        if len(pair) != 2:
            raise OverrideError(
                f"override {pattern!r} must give bits or (weight bits, activation bits), found {bits!r}"
            )
        for operand, mask, width in zip(operands, masks, pair, strict=True):
            present = [layer for layer in matched if operand.elements[layer] > 0]
            if width is None or (not present and not isinstance(bits, tuple)):
                continue
            if not present:
                raise OverrideError(
                    f"override {pattern!r} sets {operand.name} bits, but no matched layer has {operand.name}s"
                )
            mask[present] = operand.bits == _candidate(pattern, operand, width)
    return masks


def _matches(pattern: str, layers: Sequence[str], roles: Sequence[str]) -> list[int]:
    """The layers a pattern names: an exact name first, then a role, then a glob."""
    if pattern in layers:
        return [layers.index(pattern)]
    by_role = [index for index, role in enumerate(roles) if role == pattern]
    matched = by_role or [index for index, layer in enumerate(layers) if fnmatchcase(layer, pattern)]
    if not matched:
        known = list(dict.fromkeys([*roles, *layers]))
        close = difflib.get_close_matches(pattern, known, n=5, cutoff=0.4) or known[:5]
        raise OverrideError(f"override {pattern!r} matches no layer, role or glob; close names: {', '.join(close)}")
    return matched


def _candidate(pattern: str, operand: Operand, width: int) -> int:
    """`width`, if it is one of the operand's candidates."""
    if isinstance(width, bool) or width not in operand.bits.tolist():
        raise OverrideError(
            f"override {pattern!r} asks for {width!r} {operand.name} bits; the candidates are {operand.bits.tolist()}"
        )
    return width
