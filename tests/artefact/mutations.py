"""Artefacts changed with their structure in mind, sealed again, and what comes of using them.

`mutated` changes one to three things in a valid artefact: names, targets, arguments, shapes, settings, tensors, texts,
values of card, journal and allocation. `use` does with the file what a user does. Anything but a typed error is a
fault, as is a use that takes long or much memory (`Cost`).
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.artefact.allowlist import ATTRIBUTES, FUNCTIONS, METHODS
from fxquant.artefact.container import compress, decompress, pack_file, read_file
from fxquant.artefact.module_settings import CLASSES

Document = dict[str, Any]


_COMPRESSED = ("graph", "journal", "allocation", "answers")


NAMES = [
    "self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr", "len", "print", "forward",
    "None", "match", "_", "__class__", "__init__", "x", "output", "math_ceil", "a b", "", "é", "x" * 600, "\ud800",
    "input",
    "_modules", "_parameters", "graph", "training", "fill_", "cls.mro", "format", "blocks..0", ".x", "0", "weight",
]  # fmt: skip


NUMBERS = [
    0, 1, -1, 2, 3, 7, 8, 9, 16, 17, 255, 256, 65_535, 2**20, 2**31, 2**40, 2**53, 2**63 - 1, 2**63, -(2**63), 10**400,
    0.0,
    -0.5, 0.5, 1e-30, 1e30, 1e308, math.inf, -math.inf, math.nan,
]  # fmt: skip


JUNK: list[Any] = [
    None, True, False, "", "x", "cpu", "cuda:0", "inf", [], [[]], [1, 2], [0] * 5000, {}, {"node": 0}, {"node": 10**9},
    {"tuple": [1, 2]}, {"dict": [["a", 1]]}, {"slice": [None, None, 0]}, {"slice": [0, 10**12, 1]}, {"float": "nan"},
    {"dtype": "complex64"}, {"dtype": "int8"}, {"device": "meta"}, {"ellipsis": True}, {"format": "channels_last"},
    {"node": 1, "tuple": []}, [[[[[[[[1]]]]]]]],
]  # fmt: skip


KEYWORDS = ["inplace", "out", "dim", "dtype", "device", "keepdim", "size", "self", "input", "key", "memory_format", "p"]


@dataclass(frozen=True)
class Base:
    """A valid artefact in parts: documents by name ("graph", "card", ...), together as one JSON text, and tensors."""

    name: str
    text: str
    tensors: dict[str, Tensor]
    image_shape: tuple[int, ...]

    @property
    def documents(self) -> Document:
        """The documents by name, to be changed: others each time."""
        documents: Document = json.loads(self.text)
        return documents

    @classmethod
    def read(cls, path: Path) -> Base:
        """The parts of a file."""
        texts, tensors = read_file(path)
        documents = {key: json.loads(decompress(texts[key], key)) for key in _COMPRESSED if key in texts}
        documents["card"] = json.loads(texts["card"])
        return cls(path.stem, json.dumps(documents), tensors, tuple(documents["graph"]["image_shape"]))


def seal(documents: Document, tensors: dict[str, Tensor], raw: dict[str, str] | None = None) -> bytes:
    """The bytes of a file; its digest is right. raw: texts to take in the place of documents, as they are."""
    texts = {key: json.dumps(value) for key, value in documents.items()} | (raw or {})
    return pack_file({key: compress(text) if key in _COMPRESSED else text for key, text in texts.items()}, tensors)


class Case:
    """One changed artefact in the making."""

    def __init__(self, base: Base, seed: int) -> None:
        self.dice = random.Random(seed)
        self.documents = base.documents
        self.tensors = dict(base.tensors)
        self.raw: dict[str, str] = {}
        self.nodes: list[Any] = self.documents["graph"]["nodes"]
        self.modules: Document = self.documents["graph"]["modules"]

    @property
    def node(self) -> Document:
        """Some node."""
        return self.dice.choice([node for node in self.nodes if isinstance(node, dict)])

    @property
    def spec(self) -> Document:
        """Some module's settings, or a part of them."""
        spec = self.dice.choice([spec for spec in self.modules.values() if isinstance(spec, dict)])
        inner = [value for value in spec.values() if isinstance(value, dict)]
        return self.dice.choice([spec, *inner])

    def value(self) -> Any:
        """Anything."""
        return copy.deepcopy(self.dice.choice(self.dice.choice([NUMBERS, JUNK, NAMES])))

    def anywhere(self, document: Any, change: Callable[[Any, Any], None]) -> None:
        """Apply change(owner, key) at some place of a document."""
        places: list[tuple[Any, Any]] = []
        level = [document]
        while level:
            owner = level.pop()
            keys = owner.keys() if isinstance(owner, dict) else range(len(owner)) if isinstance(owner, list) else ()
            places += [(owner, key) for key in keys]
            level += [owner[key] for key in keys]
        if places:
            change(*self.dice.choice(places))


def _rename(case: Case) -> None:
    case.node["name"] = case.dice.choice([*NAMES, case.node.get("name")])


def _retarget(case: Case) -> None:
    node = case.node
    node["op"] = case.dice.choice(["call_function", "call_method", "call_module", "get_attr", node.get("op"), "output"])
    listed = {"call_function": sorted(FUNCTIONS), "call_method": sorted(METHODS), "call_module": sorted(case.modules)}
    node["target"] = case.dice.choice(listed.get(node["op"], NAMES) or NAMES)


def _rewire(case: Case) -> None:
    node = case.node
    arguments = node.setdefault("args", [])
    reference = {"node": case.dice.choice([case.dice.randrange(len(case.nodes)), case.dice.choice(NUMBERS)])}
    if isinstance(arguments, list):
        places = [i for i, value in enumerate(arguments) if isinstance(value, dict)] or [len(arguments)]
        place = case.dice.choice(places)
        arguments[place : place + 1] = [reference]


def _reargue(case: Case) -> None:
    arguments = case.node.setdefault("args", [])
    if isinstance(arguments, list):
        place = case.dice.randrange(len(arguments) + 1)
        arguments[place : place + case.dice.randrange(2)] = [case.value() for _ in range(case.dice.randrange(3))]


def _keyword(case: Case) -> None:
    options = case.node.setdefault("kwargs", {})
    if isinstance(options, dict):
        options[case.dice.choice([*KEYWORDS, *NAMES])] = case.value()


def _attribute(case: Case) -> None:
    case.node.update(
        op="call_function",
        target="builtins.getattr",
        args=[{"node": 0}, case.dice.choice([*sorted(ATTRIBUTES), *NAMES])],
    )


def _reshape(case: Case) -> None:
    node = case.dice.choice(
        [node for node in case.nodes if isinstance(node, dict) and node.get("shape")] or [case.node]
    )
    shape = node.get("shape")
    if isinstance(shape, list) and shape and case.dice.random() < 0.7:
        case.dice.shuffle(shape)
    else:
        node["shape"] = [case.dice.choice(NUMBERS) for _ in range(case.dice.randrange(5))]


def _reorder(case: Case) -> None:
    place, other = (case.dice.randrange(len(case.nodes)) for _ in range(2))
    action = case.dice.randrange(3)
    if action == 0:
        case.nodes[place], case.nodes[other] = case.nodes[other], case.nodes[place]
    elif action == 1:
        del case.nodes[place]
    else:
        case.nodes.insert(other, copy.deepcopy(case.nodes[place]))


def _setting(case: Case) -> None:
    spec = case.spec
    key = case.dice.choice([*spec, "inplace", "device"])
    old = spec.get(key)
    near = [old + 1, old - 1, old * 2, -old] if type(old) in (int, float) else [old, [old, old]]
    spec[key] = case.dice.choice([*near, case.value(), copy.deepcopy(case.dice.choice(list(case.modules.values())))])


def _class(case: Case) -> None:
    kinds = [*(kind.__name__ for kind in CLASSES), "QuantizedLinear", "QuantizedConv2d", "QuantizedMatmul", "Observer"]
    case.spec["class"] = case.dice.choice(kinds)


def _exchange(case: Case) -> None:
    first, second = (case.dice.choice(list(case.modules)) for _ in range(2))
    case.modules[first], case.modules[second] = case.modules[second], case.modules[first]


def _tensor(case: Case) -> None:
    name = case.dice.choice(sorted(case.tensors))
    tensor = case.tensors[name].clone()
    changes: list[Callable[[], Tensor]] = [
        lambda: tensor.to(case.dice.choice([torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])),
        lambda: tensor.reshape(-1),
        lambda: tensor.reshape(-1)[: case.dice.randrange(tensor.numel() + 1)],
        lambda: tensor.expand(2, *tensor.shape).contiguous(),
        lambda: tensor.flip(0) if tensor.ndim else tensor,
        lambda: torch.full_like(tensor, case.dice.choice([0, 1, 100, 127])),
        lambda: case.tensors[case.dice.choice(sorted(case.tensors))].clone(),
        lambda: tensor.T.contiguous() if tensor.ndim == 2 else tensor,
        lambda: (
            torch.full_like(tensor, case.dice.choice([math.nan, math.inf, -1.0, 1e38, 1e-45]))
            if tensor.is_floating_point()
            else torch.full_like(tensor, case.dice.choice([0, 1, 100, 127]))
        ),
    ]
    if case.dice.random() < 0.1:
        del case.tensors[name]
    else:
        case.tensors[name] = case.dice.choice(changes)()


def _aliases(case: Case) -> None:
    name = case.dice.choice(sorted(case.modules))
    spec, own = case.modules[name], {k: t for k, t in case.tensors.items() if k.startswith(f"{name}.")}
    for index in range(case.dice.choice([10, 200])):
        alias = f"{name}_{index}"
        case.modules[alias] = copy.deepcopy(spec)
        case.nodes.insert(-1, {"name": f"m{index}", "op": "call_module", "target": alias, "args": [{"node": 0}]})
        case.tensors |= {alias + key.removeprefix(name): tensor for key, tensor in own.items()}


def _grow(case: Case) -> None:
    """Nodes that double what they get, or ask for much."""
    last = len(case.nodes) - 2
    calls = [
        ("torch.cat", [{"tuple": [{"node": last}, {"node": last}]}]),
        ("operator.add", [{"node": last}, {"node": last}]),
        ("torch.zeros", [case.dice.choice(NUMBERS)]), ("torch.arange", [case.dice.choice(NUMBERS)]),
        ("operator.mul", [case.dice.choice(NUMBERS), case.dice.choice(NUMBERS)]),
        ("operator.pow", [case.dice.choice(NUMBERS), case.dice.choice(NUMBERS)]), ("operator.mul", ["x", 10**9]),
        ("functional.pad", [{"node": last}, {"tuple": [10**6, 10**6]}]), ("torch.eye", [10**6]),
        ("torch.tile", [{"node": last}, {"tuple": [10**5, 1]}]), ("torch.outer", [{"node": last}, {"node": last}]),
    ]  # fmt: skip
    target, args = case.dice.choice(calls)
    for index in range(case.dice.choice([1, 3, 30])):
        record = {"name": f"grown_{index}", "op": "call_function", "target": target, "args": copy.deepcopy(args)}
        case.nodes.insert(-1, record)
        args = json.loads(json.dumps(args).replace(f'{{"node": {last + index}}}', f'{{"node": {last + index + 1}}}'))


def _write(case: Case) -> None:
    """In-place operations on the image, a constant, or a view of one."""
    source = case.dice.randrange(len(case.nodes))
    target = case.dice.choice(["add_", "mul_", "relu_", "sub_", "div_"])
    case.nodes.insert(-1, {"name": "written", "op": "call_method", "target": target, "args": [{"node": source}, 2]})


def _text(case: Case) -> None:
    key = case.dice.choice([*_COMPRESSED, "card"])
    text = json.dumps(case.documents.get(key, {}))
    cut = case.dice.randrange(len(text) + 1)
    broken = [
        text[:cut], text + "x", "null", "", "[" * 10**5, "[" * 40 + "]" * 40, "[" + "[]," * 10**5 + "0]", "9" * 5000,
        '"\\ud800"', f'{{"a": 1, "a": 2, {text[1:]}', text.replace("1", "1e999"), text.replace("true", "NaN"),
    ]  # fmt: skip
    case.raw[key] = case.dice.choice(broken)


def _anywhere(case: Case) -> None:
    key = case.dice.choice([*case.documents, "graph", "graph"])
    action = case.dice.randrange(4)

    def change(owner: Any, place: Any) -> None:
        if action == 0:
            del owner[place]
        elif action == 1 and isinstance(owner, list):
            owner.insert(place, copy.deepcopy(owner[place]))
        elif action == 2 and isinstance(owner, dict):
            owner[case.dice.choice([*NAMES, str(place)])] = copy.deepcopy(owner[place])
        else:
            owner[place] = case.value()

    case.anywhere(case.documents.get(key, {}), change)


MUTATIONS = (
    _rename, _retarget, _retarget, _rewire, _rewire, _reargue, _reargue, _keyword, _attribute, _reshape, _reorder,
    _setting, _setting, _setting, _class, _exchange, _tensor, _tensor, _tensor, _aliases, _grow, _write, _text,
    _anywhere, _anywhere, _anywhere, _anywhere,
)  # fmt: skip


def mutated(base: Base, seed: int) -> tuple[str, bytes]:
    """What was changed, and the bytes of the sealed file; the same for the same seed."""
    case = Case(base, seed)
    done = []
    for _ in range(case.dice.choice([1, 1, 1, 2, 3])):
        mutation = case.dice.choice(MUTATIONS)
        try:
            mutation(case)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
            continue  # it found nothing to change after the ones before it
        done.append(mutation.__name__.strip("_"))
    return " ".join(done), seal(case.documents, case.tensors, case.raw)
