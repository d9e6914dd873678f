"""How texts of options are read: `fc1=6`, `3,4,8`, `224x224`, `name=value`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fxquant.errors import DataError, OptionError, OverrideError

if TYPE_CHECKING:
    from allocators.problem.overrides import Bits


def parse_inputs(texts: list[str] | None) -> dict[str, Any] | None:
    """Fixed arguments of the model's forward from texts `name=value`, values as JSON; None where there are none.

    Raises OptionError for a text that is no such pair.
    """
    found: dict[str, Any] = {}
    for text in texts or []:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise OptionError(
                f"--input {text!r} is no name=value with a value in JSON, such as interpolate_pos_encoding=false"
            ) from error
    return found or None


def parse_overrides(texts: list[str] | None) -> dict[str, Bits]:
    """`["blocks.0.mlp.fc1=6", "fc2=4/8", "head=8/-"]` as `fxquant.compile` takes them. Raises OverrideError."""
    found: dict[str, Bits] = {}
    for text in texts or []:
        layer, _, bits = text.rpartition("=")
        parts = bits.split("/")
        is_read = all(_is_width(part) or (part == "-" and len(parts) == 2) for part in parts)
        if not layer or len(parts) > 2 or not is_read:
            raise OverrideError(f"an override reads layer=6, or layer=4/8 for weight/activation bits; found {text!r}")
        widths = [int(part) if _is_width(part) else None for part in parts]
        found[layer] = (widths[0], widths[1]) if len(widths) == 2 else int(bits)
    return found


def _is_width(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 4


def parse_bits(text: str) -> tuple[int, ...]:
    """`3,4,8` as widths. Raises OptionError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(map(_is_width, parts)):
        raise OptionError(f"bits are widths with commas between, such as 3,4,8; found {text!r}")
    return tuple(map(int, parts))


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """`224x224,256x320` as heights and widths. Raises OptionError."""
    pairs = [part.strip().split("x") for part in text.split(",")]
    if not all(len(pair) == 2 and all(each.isascii() and each.isdecimal() for each in pair) for pair in pairs):
        raise OptionError(f"sizes are heightxwidth with commas between, such as 224x224,256x320; found {text!r}")
    return [(int(height), int(width)) for height, width in pairs]


def parse_numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    """`0.5,0.5,0.5` as numbers. Raises DataError."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(f"{name} must be numbers with commas between, such as 0.5,0.5,0.5; found {text!r}") from error
