"""Calls with one or two arguments that are no good, made at random: every one has to be refused by a typed error.

    outcome = Outcome()
    for call in bad_calls(Workplace.make(folder), count=100, seed=0):
        outcome.add(call)
    print(outcome.untyped, outcome.accepted)

Every entry point is a function with valid arguments; each argument has values that are no good: of every type that does
not fit it, and of the right type but out of range. Calibration is replaced by an error of its own, so that no call
takes long and one that is refused too late counts as accepted.
"""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import fxquant
from allocators.problem.budget import Budget
from fxquant.checks.arguments import shown
from fxquant.checks.hints import fitted
from fxquant.data.images import ImageData
from fxquant.data.preprocessing import Preprocessing
from fxquant.errors import FxQuantError
from fxquant.session.session import Session
from tests.models import images, vit

WRONG_SIZE = torch.zeros(2, 3, 4, 4)
ANYTHING: tuple[Any, ...] = (
    None, True, 3, -1, 2.5, math.nan, math.inf, 10**400, 1j, "", "x", "W4A4", b"x", [], [1], {}, {"a": 1}, {1: 2},
    (1, 2), {3}, object(), int, len, torch.zeros(2), WRONG_SIZE, np.zeros(3), np.int64(-5), Path("missing/x"),
)  # fmt: skip
"""Values of every type; which of them an argument takes, its annotation says."""

Make = Callable[[], Any]


@dataclass(frozen=True)
class Entry:
    """A function to call.

    valid: an argument's good value, made anew. bad: values that are refused, by argument. may_pass: damaged files, of
    which some are as good as before.
    """

    name: str
    function: Callable[..., Any]
    valid: Mapping[str, Make]
    bad: Mapping[str, Sequence[Any]]
    may_pass: bool = False


@dataclass(frozen=True)
class Call:
    """One call that has to be refused."""

    entry: Entry
    replaced: Mapping[str, Any]

    def __str__(self) -> str:
        """`compile(seed='x' (str))`."""
        return f"{self.entry.name}({', '.join(f'{name}={shown(value)}' for name, value in self.replaced.items())})"

    def run(self) -> Any:
        """Make the call."""
        good = {name: make() for name, make in self.entry.valid.items() if name not in self.replaced}
        return self.entry.function(**good, **self.replaced)


@dataclass
class Outcome:
    """What became of calls: counts of typed errors, by kind, and the faults."""

    typed: dict[str, int] = field(default_factory=dict)
    untyped: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    harmless: int = 0

    def add(self, call: Call) -> None:
        """Make a call and note how it ended."""
        try:
            call.run()
        except FxQuantError as error:
            self.typed[type(error).__name__] = self.typed.get(type(error).__name__, 0) + 1
        except CalibrationHasBegun:
            self.accepted.append(f"{call}: calibration has begun")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            self.untyped.append(f"{call}: {type(error).__name__}: {str(error)[:80]} at {place}")
        else:
            if call.entry.may_pass:
                self.harmless += 1
            else:
                self.accepted.append(str(call))


class CalibrationHasBegun(BaseException):
    """A call that should have been refused got as far as calibration."""


def bad_calls(entries: Sequence[Entry], count: int, seed: int) -> Iterator[Call]:
    """Calls, entry points in turn; which arguments are bad, and how, is drawn."""
    draw = random.Random(seed)
    for index in range(count):
        entry = entries[index % len(entries)]
        names = draw.sample(list(entry.bad), min(len(entry.bad), 1 + (draw.random() < 0.3)))
        yield Call(entry, {name: draw.choice(entry.bad[name]) for name in names})


class Good:
    """Valid arguments that take a while to make, once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = vit(embed_dim=16, depth=1, num_heads=2, img_size=16, num_classes=4)
        self.images = images(2, 16)
        self.session = Session(self.model, self.images, recipe="naive_min_max")
        self.compiled = fxquant.compile(self.model, "W8A8", calibration=self.images, recipe="naive_min_max")
        self.traced = fxquant.trace(self.model, self.images)
        self.preprocessing = Preprocessing((3, 16, 16))
        self.data = ImageData("two", 2, lambda index: self.images[index], torch.tensor([0, 1]))
        np.savez(folder / "good.npz", images=self.images.numpy(), labels=np.array([0, 1]))
        self.compiled.save(folder / "good.fxq")
        torch.save(self.model.state_dict(), folder / "good.pt")
        save_file(self.model.state_dict(), folder / "good.safetensors")
        noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        for suffix in ("png", "jpg", "gif", "bmp", "webp", "tif", "ppm"):
            Image.fromarray(noise).save(folder / f"good.{suffix}")
        np.savez_compressed(folder / "packed.npz", images=noise[None], labels=np.array([1]))
        (folder / "names.json").write_text('{"0": "ant", "1": "bee"}')
        (folder / "labels.csv").write_text("image,label\ngood.png,ant\ngood.jpg,bee\n")


class Endless:
    """Reports no progress: it has no `track`."""


def unfit(annotation: Any, *more: Any, but: Sequence[Any] = ()) -> list[Any]:
    """What does not fit an annotation, and more; without the objects in `but`."""
    found = list(more)
    for value in ANYTHING:
        try:
            fitted("it", value, annotation, UnfitError)
        except UnfitError:
            if not any(value is each for each in but):
                found.append(value)
    return found


class UnfitError(FxQuantError):
    """What `unfit` has values refused by."""

    @classmethod
    def for_type(cls, message: str) -> FxQuantError:
        return cls(message)


def is_budget(value: Any) -> bool:
    """Whether a budget can be read from this, though it may be met by no model."""
    try:
        Budget.parse(value)
    except FxQuantError:
        return False
    return True
