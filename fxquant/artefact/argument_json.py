"""Arguments of graph nodes as JSON values, and back.

Argument values: None, bool, int, finite float, str and lists are themselves; everything else is an object with one
key: {"node": index}, {"tuple": [...]}, {"dict": [[key, value], ...]}, {"slice": [start, stop, step]},
{"float": "inf"}, {"dtype": "float32"}, {"device": "cpu"}, {"format": "channels_last"}, {"ellipsis": true}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from fxquant.checks.untrusted import LIST, checked, choice, dtype_named
from fxquant.errors import ArtefactError

_FORMATS = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.memory_format)
}
_LONGEST_TEXT = 4096
MOST_VALUES = 100_000
"""In the arguments of all nodes of a graph; a Swin-L's have 13,000."""


def value_to_json(value: Any, index: Mapping[Node, int], where: str) -> Any:
    """JSON of an argument. Raises ArtefactError, naming `where`, for what a file cannot hold.

    Args:
        value: an argument of a node.
        index: the position of every node in the graph.
        where: the node, for the message.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Node):
        return {"node": index[value]}
    if isinstance(value, tuple | list):
        items = [value_to_json(item, index, where) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": [[value_to_json(part, index, where) for part in item] for item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [value_to_json(part, index, where) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype | torch.memory_format):
        kind = "dtype" if isinstance(value, torch.dtype) else "format"
        return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is ...:
        return {"ellipsis": True}
    raise ArtefactError(f"{where} has an argument of type {type(value).__name__}, which cannot be kept: {value!r}")


def values_from_json(values: list[Any], nodes: list[Node], where: str, budget: list[int]) -> list[Any]:
    """The arguments of one node that `value_to_json` wrote.

    Args:
        values: the arguments, as the file has them in JSON.
        nodes: the nodes before this one, the only ones that its arguments may refer to.
        where: the node, for messages.
        budget: one number, how many values the arguments of the graph may still have; it is counted down.

    Raises ArtefactError for what cannot be read, and for more values than a graph needs.
    """
    return [_value_from_json(value, nodes, where, budget) for value in values]


def _value_from_json(value: Any, nodes: list[Node], where: str, budget: list[int]) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or (type(value) is str and len(value) > _LONGEST_TEXT):
        raise ArtefactError(f"{where} has more constants than the arguments of a graph need")
    if type(value) is list:
        return [_value_from_json(item, nodes, where, budget) for item in value]
    if type(value) is not dict:
        return value
    try:
        ((kind, content),) = value.items()
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](lambda items: _items(items, nodes, where, budget), content)
        return _earlier(content, nodes, where) if kind == "node" else _CONSTANTS[kind](content)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ArtefactError(f"{where} has an argument that cannot be read: {value!r:.200}: {error}") from error


def _earlier(position: Any, nodes: list[Node], where: str) -> Node:
    if type(position) is not int or not 0 <= position < len(nodes):
        raise ArtefactError(f"{where} refers to node {position!r}; only the {len(nodes)} nodes before it exist there")
    return nodes[position]


def _items(values: Any, nodes: list[Node], where: str, budget: list[int]) -> tuple[Any, ...]:
    if type(values) is not list:
        raise ArtefactError(f"{where} has {values!r:.200} where a list belongs")
    return tuple(_value_from_json(item, nodes, where, budget) for item in values)


def _slice(parts: tuple[Any, ...]) -> slice:
    start, stop, step = parts
    return slice(start, stop, step)


_Read = Callable[[Any], tuple[Any, ...]]
_CONTAINERS: dict[str, Callable[[_Read, Any], Any]] = {
    "tuple": lambda read, items: read(items),
    "slice": lambda read, parts: _slice(read(parts)),
    "dict": lambda read, pairs: dict(map(read, checked(pairs, LIST, "a dict"))),
}
_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "float": lambda text: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[text],
    "dtype": lambda name: dtype_named(name, "an argument"),
    "device": lambda name: torch.device(checked(name, choice("cpu"), "a device")),
    "format": lambda name: _FORMATS[name],
    "ellipsis": lambda flag: ...,
}
