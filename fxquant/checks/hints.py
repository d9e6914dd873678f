"""Arguments and fields against their type hints: they fit, or there is a typed error that says what was expected.

    @checked(OptionError, model=ModelError)     # a function: every argument, before it runs
    check_fields(self, CalibrationError)        # in __post_init__ of a frozen dataclass: every field

Understood: plain classes, enumerations (also by value), unions, `Literal`, `tuple`, `Sequence`, `Mapping`, `Callable`,
paths, and of a `Protocol` that its methods are there. Deliberately not done: what numbers mean and which go together;
each class says that itself.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, ParamSpec, TypeVar

from fxquant.checks.arguments import Error, methods, number, path, shown, whole

Given = ParamSpec("Given")
Result = TypeVar("Result")
_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}


def check_fields(instance: Any, error: Error, **errors: Error) -> None:
    """Raise unless every field of a frozen dataclass fits its annotation; numpy's numbers become Python's.

    Args:
        instance: the dataclass; its fields are set anew.
        error: what to raise, as its TypeError twin for another type.
        errors: the classes of error for fields that raise another one, by the field's name.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        name = f"{type(instance).__name__}: {field.name}"
        found = fitted(name, getattr(instance, field.name), hints[field.name], errors.get(field.name, error))
        object.__setattr__(instance, field.name, found)


def checked(error: Error, **errors: Error) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """A decorator: arguments that do not fit the function's annotations raise before the function runs.

    Args:
        error: what to raise, as its TypeError twin for another type.
        errors: the classes of error for arguments that raise another one, by the argument's name.
    """

    def decorate(function: Callable[Given, Result]) -> Callable[Given, Result]:
        signature = inspect.signature(function)
        hints = functools.cache(lambda: _hints(function))

        @functools.wraps(function)
        def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            where, known = function.__name__.strip("_"), hints()
            given = _bound(signature, known, where, args, kwargs, error)
            for name, value in given.arguments.items():
                kind = signature.parameters[name].kind
                if kind is inspect.Parameter.VAR_KEYWORD:
                    given.arguments[name] = {
                        each: fitted(f"{where}: {each}", item, known.get(each, Any), errors.get(each, error))
                        for each, item in value.items()
                    }
                elif kind is not inspect.Parameter.VAR_POSITIONAL:
                    wanted = known.get(name, Any)
                    given.arguments[name] = fitted(f"{where}: {name}", value, wanted, errors.get(name, error))
            return function(*given.args, **given.kwargs)

        return run

    return decorate


def fitted(name: str, value: Any, annotation: Any, error: Error) -> Any:
    """`value`, which fits the annotation, with numpy's numbers as Python's. Raises `error`, or its twin for a type.

    Args:
        name: how the message calls the value.
        value: what the caller gave.
        annotation: the type hint that it must fit.
        error: the class of the error; its twin is a TypeError too.
    """
    origin: Any = typing.get_origin(annotation)
    inner = typing.get_args(annotation)
    if annotation is Any or (origin is None and not isinstance(annotation, type)):
        return value
    if origin in (typing.Union, types.UnionType):
        return _fitted_union(name, value, annotation, error)
    if origin is typing.Literal:
        if not isinstance(value, str) or value not in inner:
            kind = error if isinstance(value, str) else error.for_type
            raise kind(f"{name} must be {described(annotation)}, found {shown(value)}")
        return value
    if origin is tuple:
        return _fitted_tuple(name, value, inner, error)
    if origin in (collections.abc.Sequence, list):
        return _fitted_list(name, value, inner[0], error)
    if origin in (collections.abc.Mapping, dict):
        return _fitted_mapping(name, value, inner, error)
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
    elif issubclass(annotation, enum.Enum):
        return _fitted_member(name, value, annotation, error)
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
    if origin is os.PathLike:
        return "a path"
    if origin is collections.abc.Callable:
        return "a function"
    if origin is tuple:
        return f"a tuple ({', '.join('...' if each is ... else described(each) for each in inner)})"
    name = getattr(annotation, "__name__", str(annotation))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations by argument; those of a TypedDict that `**options` unpacks among them.

    Types that are texts may name modules in full, which are then imported somewhere.
    """
    found = typing.get_type_hints(function)
    loaded = {name: module for name, module in sys.modules.items() if "." not in name}
    unpacked = [each for each in found.values() if typing.get_origin(each) is typing.Unpack]
    for each in unpacked:
        found |= typing.get_type_hints(typing.get_args(each)[0], localns=loaded)
    return found


def _bound(
    signature: inspect.Signature, known: Mapping[str, Any], where: str, args: Any, kwargs: Any, error: Error
) -> inspect.BoundArguments:
    """Arguments by name. Raises for a missing, a surplus and an unknown one."""
    try:
        given = signature.bind(*args, **kwargs)
    except TypeError as cause:
        raise error.for_type(f"{where}: {cause}") from cause
    unpacks = any(typing.get_origin(each) is typing.Unpack for each in known.values())
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and unpacks:
            names = [each for each in known if each not in (name, "return")]
            if unknown := [each for each in given.arguments.get(name, ()) if each not in names]:
                raise error.for_type(f"{where} has no option {unknown[0]!r}; it has {', '.join(names)}")
    return given


def _fitted_union(name: str, value: Any, annotation: Any, error: Error) -> Any:
    """The value as the first of the alternatives that it fits; the error of the only one that is not None otherwise."""
    alternatives = [each for each in typing.get_args(annotation) if each is not type(None)]
    if value is None and len(alternatives) < len(typing.get_args(annotation)):
        return None
    if len(alternatives) == 1:
        return fitted(name, value, alternatives[0], error)
    if {str, os.PathLike} == {typing.get_origin(each) or each for each in alternatives}:
        path(name, value, error)
        return value
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


def _fitted_list(name: str, value: Any, item: Any, error: Error) -> list[Any]:
    """A list of items that fit: of a list, a tuple or an array, not of text."""
    if isinstance(value, str | bytes | Mapping) or not (isinstance(value, Iterable) and isinstance(value, Sized)):
        raise error.for_type(f"{name} must be a list, found {shown(value)}")
    if not isinstance(value, Sequence) and getattr(value, "ndim", 1) != 1:
        raise error.for_type(f"{name} must be a list, found {shown(value)} of {getattr(value, 'ndim', 0)} dimensions")
    return [fitted(f"{name}[{index}]", each, item, error) for index, each in enumerate(value)]


def _fitted_mapping(name: str, value: Any, inner: tuple[Any, Any], error: Error) -> dict[Any, Any]:
    """A dict of keys and values that fit, of any mapping."""
    if not isinstance(value, Mapping):
        raise error.for_type(f"{name} must be a mapping, found {shown(value)}")
    key, item = inner
    return {
        fitted(f"a key of {name}", one, key, error): fitted(f"{name}[{one!r}]", other, item, error)
        for one, other in value.items()
    }


def _fitted_member(name: str, value: Any, kind: type[enum.Enum], error: Error) -> enum.Enum:
    """A member of an enumeration, also by its value."""
    if isinstance(value, kind):
        return value
    known = [member.value for member in kind]
    if not isinstance(value, str):
        raise error.for_type(f"{name} must be one of {', '.join(map(repr, known))}, found {shown(value)}")
    if value not in known:
        raise error(f"{name} must be one of {', '.join(map(repr, known))}, found {shown(value)}")
    return kind(value)
