"""What a model returns: tensors in tuples, lists, dicts and objects of the model's own, nested as it likes.

A graph returns tensors only: one, or a tuple of all the tensors in the tree, in the order in which they stand there.
The tree itself is kept apart, as plain data in a note of the graph and in files:

    {"logits": tensor, "hidden_states": (tensor, tensor), "size": 4}

    {"dict": [["logits", {"tensor": 0}],
              ["hidden_states", {"tuple": [{"tensor": 1}, {"tensor": 2}]}],
              ["size", {"value": 4}]]}

A tree that was made from a live output also knows the classes of its containers, and builds the same again: named
tuples, OrderedDict, dataclasses, ModelOutput of transformers. A file never names a class, so that a model from a file
returns plain tuples, lists and dicts. Not kept: attributes of a container besides what it holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fxquant.errors import ArtefactError, TraceError
from fxquant.graph.notes import Note

Output = Tensor | tuple[Tensor, ...]
"""What a graph returns: one tensor, or all that are in the tree."""

TENSOR, VALUE, TUPLE, LIST, DICT = "tensor", "value", "tuple", "list", "dict"
_DEEPEST, _MOST = 16, 1000
_PLAIN: dict[str, Callable[[Any], Any]] = {TUPLE: tuple, LIST: list}

TREE: Note[dict[str, Any]] = Note("output_tree", dict, "make it with fxquant.trace")
"""The tree as JSON values; without it the graph returns what the model returns, one tensor. Written by tracing."""


@dataclass(frozen=True)
class Tree:
    """How the tensors of an output are arranged.

    Args:
        kind: "tensor", "value", "tuple", "list" or "dict".
        value: of a value: None, a bool, a number or a text.
        keys: of a dict, and the names of a named tuple's fields, one for each child.
        children: trees of what it holds.
        container: class of what it was made from; None: a plain one is built.
    """

    kind: str
    value: bool | int | float | str | None = None
    keys: tuple[str | int, ...] = ()
    children: tuple[Tree, ...] = ()
    container: type | None = field(default=None, compare=False)

    @property
    def is_bare(self) -> bool:
        """Whether it is one tensor and nothing around it."""
        return self.kind == TENSOR

    @property
    def names(self) -> tuple[str, ...]:
        """A name for every tensor, by keys and positions: ("logits", "hidden_states.0", "hidden_states.1")."""
        return tuple(".".join(map(str, path)) for path in self._paths())

    def _paths(self) -> Iterator[tuple[str | int, ...]]:
        if self.kind == TENSOR:
            yield ()
        for key, child in zip(self.keys or range(len(self.children)), self.children, strict=True):
            yield from ((key, *rest) for rest in child._paths())

    def build(self, tensors: Sequence[Any]) -> Any:
        """The output that has these tensors, one for each of `names`."""
        return self._built(iter(tensors))

    def _built(self, tensors: Iterator[Any]) -> Any:
        if self.kind == TENSOR:
            return next(tensors)
        if self.kind == VALUE:
            return self.value
        children = [child._built(tensors) for child in self.children]
        if self.kind == DICT:
            items: dict[Any, Any] = dict(zip(self.keys, children, strict=True))
            if self.container is None:
                return items
            return self.container(**items) if dataclasses.is_dataclass(self.container) else self.container(items)
        make: Any = self.container or _PLAIN[self.kind]
        return make(*children) if hasattr(make, "_fields") else make(children)

    def to_json(self) -> dict[str, Any]:
        """JSON values; see the module."""
        counter = iter(range(_MOST))
        return self._to_json(counter)

    def _to_json(self, counter: Iterator[int]) -> dict[str, Any]:
        if self.kind == TENSOR:
            return {TENSOR: next(counter)}
        if self.kind == VALUE:
            return {VALUE: self.value}
        children = [child._to_json(counter) for child in self.children]
        return {self.kind: [list(pair) for pair in zip(self.keys, children, strict=True)] if self.keys else children}

    @classmethod
    def from_json(cls, document: Any) -> Tree:
        """Inverse of `to_json`, with plain containers. Raises ArtefactError for anything else."""
        counter = iter(range(_MOST))
        try:
            found = cls._from_json(document, counter, 0)
        except (StopIteration, RecursionError) as error:
            raise ArtefactError(f"the output has more than {_MOST} tensors and values, or is too deep") from error
        return found

    @classmethod
    def _from_json(cls, document: Any, counter: Iterator[int], depth: int) -> Tree:
        if type(document) is not dict or len(document) != 1 or depth > _DEEPEST:
            raise ArtefactError(
                f"a part of the output's tree is neither a tensor, a plain value nor a container: {document!s:.80}"
            )
        ((kind, content),) = document.items()
        if kind == TENSOR and type(content) is int and content == next(counter):
            return cls(TENSOR)
        if kind == VALUE and _is_value(content):
            return cls(VALUE, content)
        if kind not in (TUPLE, LIST, DICT) or type(content) is not list or len(content) > _MOST:
            raise ArtefactError(
                f"a part of the output's tree is neither a tensor, a plain value nor a container: {document!s:.80}"
            )
        has_keys = kind == DICT or any(type(item) is list for item in content)
        if has_keys and not all(type(item) is list and len(item) == 2 and _is_key(item[0]) for item in content):
            raise ArtefactError(f"the output's tree has a {kind} whose keys are no texts or numbers: {document!s:.80}")
        keys = tuple(item[0] for item in content) if has_keys else ()
        if len(set(keys)) < len(keys):
            raise ArtefactError(f"the output's tree has a key twice: {document!s:.80}")
        parts = [item[1] for item in content] if has_keys else content
        return cls(kind, None, keys, tuple(cls._from_json(part, counter, depth + 1) for part in parts))


def flatten(output: Any, is_tensor: Callable[[Any], bool] | None = None) -> tuple[Tree, list[Any]]:
    """The tree of an output and its tensors.

    Args:
        output: what a model returned.
        is_tensor: what counts as a tensor; by default, what is one.

    Raises TraceError, naming the place, for what is neither a tensor, a plain value nor a container of such.
    """
    tensors: list[Any] = []
    tree = _flattened(output, is_tensor or (lambda value: isinstance(value, Tensor)), tensors, ())
    if len(tensors) > _MOST:
        raise TraceError(f"the model returns {len(tensors)} tensors: wrap it in a module that returns fewer")
    return tree, tensors


def _flattened(value: Any, is_tensor: Callable[[Any], bool], tensors: list[Any], path: tuple[Any, ...]) -> Tree:
    if is_tensor(value):
        tensors.append(value)
        return Tree(TENSOR)
    if _is_value(value):
        return Tree(VALUE, value)
    kind, keys, children = _opened(value, path)
    parts = tuple(
        _flattened(child, is_tensor, tensors, (*path, key))
        for key, child in zip(keys or range(len(children)), children, strict=True)
    )
    return Tree(kind, None, keys, parts, None if type(value) in (tuple, list, dict) else type(value))


def _opened(value: Any, path: tuple[Any, ...]) -> tuple[str, tuple[Any, ...], list[Any]]:
    """Kind, keys and children of a container."""
    where = f"at {'.'.join(map(str, path))} " if path else ""
    if len(path) > _DEEPEST:
        raise TraceError(f"the model returns containers in containers, more than {_DEEPEST} deep")
    if isinstance(value, tuple):
        return TUPLE, tuple(getattr(value, "_fields", ())), list(value)
    if isinstance(value, list):
        return LIST, (), list(value)
    if isinstance(value, Mapping):
        items = dict(value.items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    else:
        raise TraceError(
            f"the model returns {where}a {type(value).__name__}, and outputs are tensors in tuples, lists, dicts and "
            f"dataclasses: wrap it in a module whose forward returns the tensors to quantize for"
        )
    if not all(_is_key(key) for key in items):
        raise TraceError(f"the model returns {where}a {type(value).__name__} whose keys are not all texts or numbers")
    return DICT, tuple(items), list(items.values())


def _is_value(value: Any) -> bool:
    is_plain = value is None or type(value) in (bool, int, str)
    return is_plain or (type(value) is float and math.isfinite(value))


def _is_key(key: Any) -> bool:
    return type(key) in (str, int)


def flat(output: Any) -> tuple[Tree, Output]:
    """The tree of what a model returned, and what its graph returns. Raises as `flatten`."""
    tree, tensors = flatten(output)
    return tree, tensors[0] if tree.is_bare else tuple(tensors)


def leaves(output: Any) -> tuple[Any, ...]:
    """The tensors of what a graph returned, or the nodes of what it is to return."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def tree_of(graph_module: GraphModule) -> Tree:
    """How what a graph returns is arranged; without a note it is one tensor and nothing around it."""
    document = TREE.get(graph_module)
    return Tree(TENSOR) if document is None else Tree.from_json(document)
