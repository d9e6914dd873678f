"""Reading values that anybody may have written: JSON fields and tensors, each checked before it is used.

A `Rule` says what a value must be; `record` holds a JSON object against rules by name, so that whoever reads a document
lists its fields once. JSON texts are tame from the start: whole numbers fit 64 bits, other numbers are finite, no key
stands twice, nothing nests deeper than `DEEPEST`, and every text can be encoded.
"""

from __future__ import annotations

import json
import keyword
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxquant.errors import ArtefactError

DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""What weights and other float tensors may be."""
DEEPEST = 32
"""Levels of lists and objects in a JSON document."""
_WHOLE = 2**63  # bound of whole numbers
_PATH_PART = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# What a graph module has of its own, in its class or in itself (`_modules`, `_graph`, hooks): no module may replace it.
_RESERVED = frozenset(dir(GraphModule(nn.Module(), Graph()))) | frozenset(dir(GraphModule))
# In the code that torch.fx writes: the module, and the globals it always has.
_SPOKEN_FOR = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"})
_LONGEST_NAME = 512
_BRIEF = reprlib.Repr()
_BRIEF.maxstring, _BRIEF.maxlist = 80, 8


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value may be. says: in words, after "is not". holds: whether a JSON value is one."""

    says: str
    holds: Callable[[Any], bool]


def whole(lowest: int = 0, highest: int = 2**53) -> Rule:
    """Whole numbers in a range; true and false are none."""
    return Rule(
        f"a whole number from {lowest} to {highest}", lambda value: type(value) is int and lowest <= value <= highest
    )


def listed(item: Rule, longest: int = 10**6, shortest: int = 0) -> Rule:
    """Lists whose items all keep one rule.

    Args:
        item: the rule.
        longest: how many items there may be.
        shortest: how many there must be.
    """
    return Rule(
        f"a list (at least {shortest}, at most {longest}) of which each is {item.says}",
        lambda value: type(value) is list and shortest <= len(value) <= longest and all(map(item.holds, value)),
    )


def mapped(item: Rule) -> Rule:
    """Objects whose values all keep one rule."""
    return Rule(
        f"an object of which each value is {item.says}",
        lambda value: type(value) is dict and all(map(item.holds, value.values())),
    )


def choice(*values: Any) -> Rule:
    """One of a few values."""
    return Rule(
        f"one of {', '.join(map(repr, values))}",
        lambda value: any(type(value) is type(v) and value == v for v in values),
    )


def either(*rules: Rule) -> Rule:
    """Whatever one of the rules allows."""
    return Rule(" or ".join(rule.says for rule in rules), lambda value: any(rule.holds(value) for rule in rules))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300


NOTHING = Rule("null", lambda value: value is None)
FLAG = Rule("true or false", lambda value: type(value) is bool)
TEXT = Rule("a text", lambda value: type(value) is str)
NUMBER = Rule("a finite number", _is_number)
POSITIVE = Rule("a number of at least 0", lambda value: _is_number(value) and value >= 0)
OBJECT = Rule("an object", lambda value: type(value) is dict)
LIST = Rule("a list", lambda value: type(value) is list)
SHAPE = listed(whole(0, 2**48), longest=16)


def checked(value: Any, rule: Rule, what: str) -> Any:
    """The value. Raises ArtefactError, naming `what`, where it breaks the rule.

    Args:
        value: the value that a file has.
        rule: which values are allowed.
        what: how the message calls it.
    """
    if not rule.holds(value):
        raise ArtefactError(f"{what} is {_BRIEF.repr(value)}, not {rule.says}")
    return value


def record(
    document: Any, rules: Mapping[str, Rule], where: str, optional: Mapping[str, Rule] | None = None
) -> dict[str, Any]:
    """The fields of a JSON object that has all of `rules`, at most `optional` besides, and where each keeps its rule.

    Args:
        document: the value that a file has; it should be a JSON object.
        rules: the fields that must be there, with what each may be.
        where: how the message calls the object.
        optional: rules of the fields that the object may have or lack.

    Raises ArtefactError naming `where` and the field.
    """
    if type(document) is not dict:
        raise ArtefactError(f"{where} is a {type(document).__name__}, not an object")
    known = {**rules, **(optional or {})}
    if missing := rules.keys() - document.keys():
        raise ArtefactError(f"{where} has no '{min(missing)}'")
    if unknown := document.keys() - known.keys():
        raise ArtefactError(f"{where} has the unknown field '{min(unknown)!s:.100}'")
    return {key: checked(value, known[key], f"{where}: '{key}'") for key, value in document.items()}


def to_json(value: Any, what: str) -> str:
    """Compact strict JSON that `from_json` reads. Raises ArtefactError, naming `what`, for other values."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{what} cannot be written as JSON: {error}") from error
    from_json(text, object, what)
    return text


def from_json(text: str, wanted: type, what: str) -> Any:
    """The value in a JSON text, of the given type (`object`: of any). Raises ArtefactError, naming `what`.

    Args:
        text: the JSON text.
        wanted: the type that the value must have; `object` lets any pass.
        what: how the message calls the text.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_number)
        _check_tame(value)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{what} is not JSON: {error}") from error
    if wanted is not object and type(value) is not wanted:
        raise ArtefactError(f"{what} is a {type(value).__name__}, not a {wanted.__name__}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _check_tame(value: Any) -> None:
    """Raise ValueError for what later code would stumble over. Level by level: a deep value needs no deep stack."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in level:
            if type(item) is dict:
                for key in item:
                    _check_text(key)
                below.extend(item.values())
            elif type(item) is list:
                below.extend(item)
            elif type(item) is str:
                _check_text(item)
            elif type(item) is int and not -_WHOLE <= item < _WHOLE:
                raise ValueError("a whole number does not fit 64 bits")
            elif type(item) is float and not math.isfinite(item):
                raise ValueError("a number is beyond those of 64 bits")
        if not below:
            return
        level = below
    raise ValueError(f"it nests deeper than {DEEPEST} levels")


def _check_text(text: str) -> None:
    if not text.isascii():
        text.encode()  # half a surrogate pair raises UnicodeEncodeError, a ValueError
    if "\x1b" in text or "\x9b" in text:
        raise ValueError("a text has characters that tell a terminal what to do")


def field(document: Any, key: str, wanted: Any, where: str, default: Any = ...) -> Any:
    """A field of a JSON object, of exactly the type `wanted` (bool is no int), or the default where it is absent.

    Args:
        document: the value that a file has; it should be a JSON object.
        key: the name of the field.
        wanted: the type that the value must have, exactly; bool is no int.
        where: how the message calls the object.
        default: what is returned where the field is absent; without one, absence is an error.

    Raises ArtefactError naming `where`.
    """
    if type(document) is not dict:
        raise ArtefactError(f"{where} is a {type(document).__name__}, not an object")
    if key not in document and default is not ...:
        return default
    if key not in document:
        raise ArtefactError(f"{where} has no '{key}'")
    value = document[key]
    if type(value) is not wanted:
        raise ArtefactError(f"{where}: '{key}' is a {type(value).__name__}, not a {wanted.__name__}")
    return value


def sizes(value: Any, where: str) -> tuple[int, ...]:
    """A tensor shape: a list of at most 16 integers from 0 to 2^48; raises ArtefactError naming `where`."""
    if not SHAPE.holds(value):
        raise ArtefactError(f"{where}: {value!r:.100} is not a shape")
    return tuple(value)


def dtype_named(name: Any, where: str) -> torch.dtype:
    """The dtype called `name`; raises ArtefactError naming `where`."""
    if type(name) is not str or name not in DTYPES:
        raise ArtefactError(f"{where}: {name!r:.100} is not a torch dtype")
    return DTYPES[name]


def take(tensors: Mapping[str, Tensor], name: str, like: Tensor | None = None) -> Tensor:
    """A tensor of the file; with `like`, it must have that shape, and that dtype (any of FLOATS where it is float32).

    Args:
        tensors: the tensors of the file, by name.
        name: the name of the one that is wanted.
        like: a tensor whose shape and dtype it must have; any of FLOATS will do where that dtype is float32.

    Raises ArtefactError where it is missing or different.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise ArtefactError(f"tensor '{name}' is missing")
    if like is None:
        return tensor
    fits = tensor.dtype in FLOATS if like.dtype == torch.float32 else tensor.dtype == like.dtype
    if not fits or tensor.shape != like.shape:
        raise ArtefactError(
            f"tensor '{name}' is {tensor.dtype} {tuple(tensor.shape)}, expected {like.dtype} {tuple(like.shape)}"
        )
    return tensor


def check_positive(scale: Tensor, name: str) -> None:
    """Raise ArtefactError unless every element is finite and above zero."""
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ArtefactError(f"scale '{name}' has elements that are NaN, infinite or not positive")


def check_path(path: Any) -> str:
    """Return a module path such as `blocks.0.attn`; raise ArtefactError where it could reach or replace code."""
    parts = path.split(".") if type(path) is str and len(path) <= _LONGEST_NAME else [""]
    if not all(_PATH_PART.fullmatch(p) and not p.startswith("__") and p not in _RESERVED for p in parts):
        raise ArtefactError(
            f"{path!r:.100} is not a module path: parts are letters, digits and _, no name of torch.nn.Module"
        )
    return str(path)


def check_identifier(name: Any, what: str) -> str:
    """Return a name that may appear in generated code; raise ArtefactError for any other."""
    is_name = type(name) is str and len(name) <= _LONGEST_NAME and _IDENTIFIER.fullmatch(name)
    if not is_name or keyword.iskeyword(name) or name.startswith("__"):
        raise ArtefactError(f"{what} {name!r:.100} is not a name: letters, digits and _ only, no keyword")
    return str(name)


def check_variable(name: Any, what: str, taken: frozenset[str] = frozenset()) -> str:
    """Return a name that generated code may assign to: an identifier that stands for nothing else there.

    Args:
        name: the name that a file has.
        what: how the message calls it.
        taken: further names that are spoken for.

    Raises ArtefactError.
    """
    if check_identifier(name, what) in _SPOKEN_FOR | taken:
        raise ArtefactError(f"{what} {name!r} is not a name for a value: the code of a graph uses it otherwise")
    return str(name)


def element_count(shape: tuple[int, ...]) -> int:
    """Elements of a shape, without overflow."""
    return math.prod(shape)
