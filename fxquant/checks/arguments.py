"""Checks of single values that callers give: the value, or a typed error that says what was expected and found.

    whole("seed", seed, OptionError)      # an int; True and 2.0 are none, numpy's integers are

Numbers of numpy are returned as Python's, so that reprs of passes, which name kept results, are the same for both.
Against type hints, all arguments of a function and all fields of a pass at once: `fxquant.checks.hints`.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

from fxquant.errors import FxQuantError

Error = type[FxQuantError]


def whole(name: str, value: Any, error: Error, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int, within its limits.

    Args:
        name: how the message calls the argument.
        value: an int or an integer of numpy; True and 2.0 are none.
        error: what to raise, as its TypeError twin for another type.
        least: the smallest number that is allowed; None sets no limit.
        most: the largest number that is allowed; None sets no limit.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise error.for_type(f"{name} must be a whole number, found {shown(value)}")
    found = int(value)
    if (least is not None and found < least) or (most is not None and found > most):
        limits = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
        raise error(f"{name} must be {' and '.join(limits)}, found {shown(found)}")
    return found


def number(name: str, value: Any, error: Error) -> float:
    """`value` as a finite float; an int or a number of numpy is one, True is none.

    Args:
        name: how the message calls the value.
        value: what the caller gave.
        error: the class of the error.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise error.for_type(f"{name} must be a number, found {shown(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise error(f"{name} must be finite, found {shown(value)}")
    return found


def text(name: str, value: Any, error: Error) -> str:
    """`value`, which is a str.

    Args:
        name: how the message calls the value.
        value: what the caller gave.
        error: the class of the error.
    """
    if not isinstance(value, str):
        raise error.for_type(f"{name} must be text, found {shown(value)}")
    return value


def path(name: str, value: Any, error: Error) -> str:
    """A path as text: a str or os.PathLike, not empty, without a null byte.

    Args:
        name: how the message calls the value.
        value: what the caller gave.
        error: the class of the error.
    """
    if not isinstance(value, str | os.PathLike):
        raise error.for_type(f"{name} must be a path (text or pathlib.Path), found {shown(value)}")
    found = os.fspath(value)
    if not isinstance(found, str):
        raise error.for_type(f"{name} must be a path of text, found {shown(found)}")
    if not found or "\0" in found:
        raise error(f"{name} is no path: {'it is empty' if not found else f'{found!r} has a null byte'}")
    return found


def methods(name: str, value: Any, protocol: type, error: Error) -> None:
    """Raise unless `value` is an object (not a class) with the methods and properties of a Protocol.

    Args:
        name: how the message calls the value.
        value: what the caller gave.
        protocol: the Protocol whose methods and properties it must have.
        error: the class of the error.
    """
    missing = [member for member in _members(protocol) if not hasattr(value, member)]
    if missing or isinstance(value, type):
        hint = f"write {value.__name__}()" if isinstance(value, type) else f"it has no {missing[0]!r}"
        article = "an" if protocol.__name__[0] in "AEIOU" else "a"
        raise error.for_type(f"{name} must be {article} {protocol.__name__}, found {shown(value)}: {hint}")


def json_values(name: str, value: Any, error: Error) -> dict[str, Any]:
    """A mapping as a dict of JSON values: text, finite numbers, True, False, None, lists and dicts with text for keys.

    Tuples become lists.

    Args:
        name: how the message calls the value.
        value: what the caller gave.
        error: the class of the error.
    """
    if not isinstance(value, Mapping):
        raise error.for_type(f"{name} must be a mapping from text to JSON values, found {shown(value)}")
    return {_key(name, key, error): _json(f"{name}[{key!r}]", item, error, 0) for key, item in value.items()}


def shown(value: Any) -> str:
    """A value in a message: its repr where that is short, and its type."""
    try:
        found = repr(value) if isinstance(value, str | int | float | bool | tuple | list | None) else ""
    except ValueError:  # Python refuses to print an int of more than 4,300 digits
        found = ""
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    if isinstance(value, type):
        return f"the class {kind}"
    return f"{found} ({kind})" if found and len(found) <= 60 else f"a value of type {kind}"


def _members(protocol: type) -> list[str]:
    return sorted(name for name in vars(protocol) if not name.startswith("_"))


def _key(name: str, key: Any, error: Error) -> str:
    if not isinstance(key, str):
        raise error.for_type(f"{name} must have text for keys, found {shown(key)}")
    return key


def _json(name: str, value: Any, error: Error, depth: int) -> Any:
    if depth > 32:
        raise error(f"{name} is nested too deeply, or contains itself")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return whole(name, value, error)
    if isinstance(value, numbers.Real):
        return number(name, value, error)
    if isinstance(value, list | tuple):
        return [_json(f"{name}[{index}]", item, error, depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {
            _key(name, key, error): _json(f"{name}[{key!r}]", item, error, depth + 1) for key, item in value.items()
        }
    raise error.for_type(
        f"{name} must be a JSON value (text, number, True, False, None, list, dict), found {shown(value)}"
    )
