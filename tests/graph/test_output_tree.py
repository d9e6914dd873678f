"""Trees of tensors: taken apart, put together, as plain data."""

from __future__ import annotations

import json
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.errors import ArtefactError, TraceError
from fxquant.graph.output_tree import Tree, flatten

pytestmark = pytest.mark.quick

A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)
Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Scores:
    logits: Tensor
    maps: tuple[Tensor, ...] | None = None
    size: int = 4


class ModelOutput(OrderedDict):
    """As transformers has it: a dataclass whose fields are its items, those that are None left out."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) is not None:
                self[item.name] = getattr(self, item.name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


@dataclass
class ImageOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


OUTPUTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "tensor": (A, ("",)),
    "tuple": ((A, B), ("0", "1")),
    "list in dict": ({"a": [A, None, B], "n": 3}, ("a.0", "a.2")),
    "named tuple": (Pair(A, {"x": B}), ("left", "right.x")),
    "ordered": (OrderedDict([("1", A), ("0", B)]), ("1", "0")),
    "dict of numbers": ({3: A, 4: B}, ("3", "4")),
    "dataclass": (Scores(A, (B, C)), ("logits", "maps.0", "maps.1")),
    "model output": (ImageOutput(logits=A, hidden_states=(B, C)), ("logits", "hidden_states.0", "hidden_states.1")),
    "user dict": (UserDict(features=A), ("features",)),
    "size": ((A, torch.Size([2, 3])), ("0",)),
}


def same(found: Any, expected: Any) -> bool:
    """Whether two outputs have the same classes and the very same tensors."""
    if isinstance(expected, Tensor) or expected is None:
        return found is expected
    if type(found) is not type(expected):
        return False
    if isinstance(expected, tuple | list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if hasattr(expected, "items"):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    return same(vars(found), vars(expected)) if hasattr(expected, "__dict__") else found == expected


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_same_tree_is_built_again(name) -> None:
    output, names = OUTPUTS[name]
    tree, tensors = flatten(output)
    assert tree.names == names
    assert same(tree.build(tensors), output)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_tree_from_json_has_plain_containers_and_the_same_names(name) -> None:
    output, names = OUTPUTS[name]
    tree, tensors = flatten(output)
    read = Tree.from_json(json.loads(json.dumps(tree.to_json())))
    assert read == tree
    assert read.names == names
    kinds = {type(part) for part in parts(read.build(tensors))}
    assert kinds <= {Tensor, tuple, list, dict, int, type(None)}


def parts(output: Any):
    yield output
    if isinstance(output, tuple | list | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from parts(part)


@pytest.mark.parametrize(
    ("output", "message"),
    [({"a": object()}, "at a a object"), ({(1, 2): A}, "keys are not all texts"), (({A: B},), "keys are not all")],
)
def test_what_is_no_output_is_refused_with_its_place(output, message) -> None:
    with pytest.raises(TraceError, match=message):
        flatten(output)


TENSOR = {"tensor": 0}
BAD = [
    None, [], {}, {"tensor": 1}, {"tensor": True}, {"tensor": 0, "value": 1}, {"set": []}, {"value": [1]},
    {"value": float("nan")}, {"tuple": TENSOR}, {"tuple": [TENSOR, TENSOR]}, {"tuple": [{"value": None}] * 2000},
    {"dict": [TENSOR]}, {"dict": [["a", TENSOR], ["a", {"tensor": 1}]]}, {"dict": [[None, TENSOR]]},
]  # fmt: skip


@pytest.mark.parametrize("document", BAD, ids=lambda document: repr(document)[:40])
def test_json_that_is_no_tree_is_refused(document) -> None:
    with pytest.raises(ArtefactError):
        Tree.from_json(document)


def test_a_tree_deeper_than_any_model_has_is_refused() -> None:
    document: Any = {"tensor": 0}
    for _ in range(100):
        document = {"tuple": [document]}
    with pytest.raises(ArtefactError):
        Tree.from_json(document)
