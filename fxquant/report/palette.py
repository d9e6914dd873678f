"""One colour per width, for terminals and pictures alike: red is narrow, blue is wide (ColorBrewer's RdYlBu).

The scale is readable with every common colour blindness, and every cell carries its number as text besides.
"""

from __future__ import annotations

FLOAT = "#d9dce1"
"""Colour of what stays float."""

_BY_BITS = {
    2: "#d73027",
    3: "#f46d43",
    4: "#fdae61",
    5: "#fee090",
    6: "#abd9e9",
    7: "#74add1",
    8: "#4575b4",
}
_DARK = {_BY_BITS[2], _BY_BITS[8]}


def colour(bits: int | None) -> str:
    """Hexadecimal colour of a width; grey for None, the ends of the scale below 2 and above 8 bits."""
    return FLOAT if bits is None else _BY_BITS[min(max(bits, 2), 8)]


def text_colour(background: str) -> str:
    """Black or white, whichever reads on `background`."""
    return "#ffffff" if background in _DARK else "#1b1f24"


def legend() -> list[tuple[str, str]]:
    """(label, colour) pairs from narrow to wide, and `-` for what stays float or is not there."""
    return [*((str(bits), found) for bits, found in _BY_BITS.items()), ("-", FLOAT)]
