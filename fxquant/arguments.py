"""Checks of what callers give: a value fits its annotation, or there is a typed error that says what was expected.

    whole("seed", seed, OptionError)                        # an int; bool and float are none, numpy's integers are
    check_fields(self, CalibrationError)                    # in __post_init__: every field against its annotation

Numbers of numpy are taken for Python's and returned as these, so that the reprs of passes, which name kept results, are
the same for both. Understood in annotations: plain classes, `X | None`, `Literal`, `tuple`, `Mapping` and `dict`; of a
`Protocol`, that its methods are there. Deliberately not done: what numbers mean together; each class says that itself.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from fxquant.errors import FxQuantError

Error = type[FxQuantError]
_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}


def whole(name: str, value: Any, error: Error, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int, within its limits.

    Args:
        name: of the argument, for the message.
        value: an int or an integer of numpy; True and 2.0 are none.
        error: what to raise, as its TypeError twin for another type.
        least: smallest allowed; None for no limit.
        most: largest allowed.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise error.for_type(f"{name} must be a whole number, found {shown(value)}")
    found = int(value)
    if (least is not None and found < least) or (most is not None and found > most):
        limits = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
        raise error(f"{name} must be {' and '.join(limits)}, found {shown(found)}")
    return found


def number(name: str, value: Any, error: Error) -> float:
    """`value` as a finite float; an int or a number of numpy is one, True is none."""
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
    """`value`, which is a str."""
    if not isinstance(value, str):
        raise error.for_type(f"{name} must be text, found {shown(value)}")
    return value


def path(name: str, value: Any, error: Error) -> str:
    """A path as text: a str or os.PathLike, not empty, without a null byte."""
    if not isinstance(value, str | os.PathLike):
        raise error.for_type(f"{name} must be a path (text or pathlib.Path), found {shown(value)}")
    found = os.fspath(value)
    if not isinstance(found, str):
        raise error.for_type(f"{name} must be a path of text, found {shown(found)}")
    if not found or "\0" in found:
        raise error(f"{name} is no path: {'it is empty' if not found else f'{found!r} has a null byte'}")
    return found


def methods(name: str, value: Any, protocol: type, error: Error) -> None:
    """Raise unless `value` is an object (not a class) with the methods and properties of a Protocol."""
    missing = [member for member in _members(protocol) if not hasattr(value, member)]
    if missing or isinstance(value, type):
        hint = f"write {value.__name__}()" if isinstance(value, type) else f"it has no {missing[0]!r}"
        raise error.for_type(f"{name} must be a {protocol.__name__}, found {shown(value)}: {hint}")


def json_values(name: str, value: Any, error: Error) -> dict[str, Any]:
    """A mapping as a dict of JSON values: text, finite numbers, True, False, None, lists and dicts with text for keys.

    Tuples become lists.
    """
    if not isinstance(value, Mapping):
        raise error.for_type(f"{name} must be a mapping from text to JSON values, found {shown(value)}")
    return {_key(name, key, error): _json(f"{name}[{key!r}]", item, error, 0) for key, item in value.items()}


def check_fields(instance: Any, error: Error) -> None:
    """Raise unless every field of a frozen dataclass fits its annotation; numpy's numbers become Python's."""
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        name = f"{type(instance).__name__}: {field.name}"
        found = fitted(name, getattr(instance, field.name), hints[field.name], error)
        object.__setattr__(instance, field.name, found)


def check_options(what: str, given: Mapping[str, Any], known: type, error: Error) -> dict[str, Any]:
    """Options given by keyword, checked against a TypedDict: no unknown name, and values that fit.

    Args:
        what: whose options they are, for the message.
        given: the options.
        known: the TypedDict.
        error: what to raise.
    """
    hints = typing.get_type_hints(known)
    if unknown := [name for name in given if name not in hints]:
        raise error.for_type(f"{what} has no option {unknown[0]!r}; it has {', '.join(hints)}")
    return {name: fitted(name, value, hints[name], error) for name, value in given.items()}


def fitted(name: str, value: Any, annotation: Any, error: Error) -> Any:
    """`value`, which fits the annotation, with numpy's numbers as Python's. Raises `error`, or its twin for a type."""
    origin: Any = typing.get_origin(annotation)
    inner = typing.get_args(annotation)
    if annotation is Any or (origin is None and not isinstance(annotation, type)):
        return value
    if origin in (typing.Union, types.UnionType):
        return _fitted_union(name, value, annotation, error)
    if origin is typing.Literal:
        if not isinstance(value, str) or value not in inner:
            kind = error if isinstance(value, str) else error.for_type
            raise kind(f"{name} must be one of {', '.join(map(repr, inner))}, found {shown(value)}")
        return value
    if origin is tuple:
        return _fitted_tuple(name, value, inner, error)
    if origin is not None and isinstance(origin, type):
        is_fitting = callable(value) if origin is collections.abc.Callable else isinstance(value, origin)
        if not is_fitting:
            raise error.for_type(f"{name} must be {described(annotation)}, found {shown(value)}")
        return value
    if annotation is int:
        return whole(name, value, error)
    if annotation is float:
        return number(name, value, error)
    if getattr(annotation, "_is_protocol", False):
        methods(name, value, annotation, error)
    elif not isinstance(value, annotation):
        raise error.for_type(f"{name} must be {described(annotation)}, found {shown(value)}")
    return value


def described(annotation: Any) -> str:
    """An annotation in words: `int | None` as "a whole number or None"."""
    origin: Any = typing.get_origin(annotation)
    inner = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(described, inner))
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is tuple:
        return f"a tuple ({', '.join('...' if each is ... else described(each) for each in inner)})"
    return f"a {getattr(annotation, '__name__', annotation)}"


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


def _fitted_union(name: str, value: Any, annotation: Any, error: Error) -> Any:
    """The value as the first of the alternatives that it fits; the error of the only one that is not None otherwise."""
    alternatives = [each for each in typing.get_args(annotation) if each is not type(None)]
    if value is None and len(alternatives) < len(typing.get_args(annotation)):
        return None
    if len(alternatives) == 1:
        return fitted(name, value, alternatives[0], error)
    for alternative in alternatives:
        try:
            return fitted(name, value, alternative, error)
        except error:
            continue
    raise error.for_type(f"{name} must be {described(annotation)}, found {shown(value)}")


def _fitted_tuple(name: str, value: Any, inner: tuple[Any, ...], error: Error) -> tuple[Any, ...]:
    """A tuple with items that fit; a list is taken for one."""
    if not isinstance(value, tuple | list):
        raise error.for_type(f"{name} must be a tuple, found {shown(value)}")
    if len(inner) == 2 and inner[1] is ...:
        return tuple(fitted(f"{name}[{index}]", item, inner[0], error) for index, item in enumerate(value))
    if len(value) != len(inner):
        raise error(f"{name} must have {len(inner)} items, found {len(value)}")
    pairs = zip(value, inner, strict=True)
    return tuple(fitted(f"{name}[{index}]", item, kind, error) for index, (item, kind) in enumerate(pairs))


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
