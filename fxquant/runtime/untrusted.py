"""Reading values that anybody may have written: JSON fields and tensors, each checked before it is used."""

from __future__ import annotations

import json
import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import ArtefactError

DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_PATH_PART = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_RESERVED = frozenset(dir(torch.fx.GraphModule)) | {"graph", "training"}


def to_json(value: Any, what: str) -> str:
    """Compact strict JSON. Raises ArtefactError, naming `what`, for values that JSON does not have."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{what} cannot be written as JSON: {error}") from error


def from_json(text: str, kind: type, what: str) -> Any:
    """The value in a JSON text, of the given type. Raises ArtefactError, naming `what`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{what} is not JSON: {error}") from error
    if type(value) is not kind:
        raise ArtefactError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def field(document: Any, key: str, kind: Any, where: str, default: Any = ...) -> Any:
    """A field of a JSON object, of exactly the type `kind` (bool is no int), or the default where it is absent.

    Raises ArtefactError naming `where`.
    """
    if type(document) is not dict:
        raise ArtefactError(f"{where} is a {type(document).__name__}, not an object")
    if key not in document and default is not ...:
        return default
    if key not in document:
        raise ArtefactError(f"{where} has no '{key}'")
    value = document[key]
    if type(value) is not kind:
        raise ArtefactError(f"{where}: '{key}' is a {type(value).__name__}, not a {kind.__name__}")
    return value


def sizes(value: Any, where: str) -> tuple[int, ...]:
    """A tensor shape: a list of integers from 0 to 2^48; raises ArtefactError naming `where`."""
    if type(value) is not list or not all(type(size) is int and 0 <= size < 2**48 for size in value):
        raise ArtefactError(f"{where}: {value!r} is not a shape")
    return tuple(value)


def dtype_named(name: Any, where: str) -> torch.dtype:
    """The dtype called `name`; raises ArtefactError naming `where`."""
    if type(name) is not str or name not in DTYPES:
        raise ArtefactError(f"{where}: {name!r} is not a torch dtype")
    return DTYPES[name]


def take(tensors: Mapping[str, Tensor], name: str, like: Tensor | None = None) -> Tensor:
    """A tensor of the file; with `like`, it must have that shape, and that dtype (any float where `like` is float32).

    Raises ArtefactError where it is missing or different.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise ArtefactError(f"tensor '{name}' is missing")
    if like is None:
        return tensor
    fits = tensor.is_floating_point() if like.dtype == torch.float32 else tensor.dtype == like.dtype
    if not fits or tensor.shape != like.shape:
        raise ArtefactError(
            f"tensor '{name}' is {tensor.dtype} {tuple(tensor.shape)}, expected {like.dtype} {tuple(like.shape)}"
        )
    return tensor


def check_positive(scale: Tensor, name: str) -> None:
    """Raise ArtefactError unless every element is finite and above zero."""
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ArtefactError(f"scale '{name}' has elements that are NaN, infinite or not positive")


def check_path(path: str) -> str:
    """Return a module path such as `blocks.0.attn`; raise ArtefactError where it could reach or replace code."""
    parts = path.split(".") if type(path) is str else [""]
    if not all(_PATH_PART.fullmatch(p) and not p.startswith("__") and p not in _RESERVED for p in parts):
        raise ArtefactError(
            f"{path!r} is not a module path: parts are letters, digits and _, no name of torch.nn.Module"
        )
    return path


def check_identifier(name: Any, what: str) -> str:
    """Return a name that may appear in generated code; raise ArtefactError for any other."""
    if type(name) is not str or not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
        raise ArtefactError(f"{what} {name!r} is not a name: letters, digits and _ only, no keyword")
    return name


def element_count(shape: tuple[int, ...]) -> int:
    """Elements of a shape, without overflow."""
    return math.prod(shape)
