"""Accuracy over many budgets: each recipe calibrates once, and points go into a file as they are measured.

sessions = {"best": Session(model, images)}
found = sweep(sessions, [Budget.parse("W8A8"), Budget.parse("W4A4")], [None], measure, Results("points.json"), "")
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from allocators.allocator import Allocator
from allocators.problem.budget import Budget
from fxquant import ranks
from fxquant.artefact.cache import signature
from fxquant.artefact.container import write_file
from fxquant.checks.arguments import shown
from fxquant.checks.hints import checked
from fxquant.errors import BudgetError, DataError, OptionError
from fxquant.measure.accuracy import Accuracy
from fxquant.session.session import Session


class Results:
    """Points of a sweep, kept in a JSON file after every one, so that a sweep that stopped goes on where it was.

    path: None keeps them in memory only. Raises DataError where the file is not one of results.
    """

    @checked(DataError)
    def __init__(self, path: str | PathLike[str] | None = None) -> None:
        """Read the points that are there."""
        self.path = None if path is None else Path(path)
        self.points: dict[str, dict[str, Any]] = {}
        if self.path is None or not os.path.exists(self.path):
            return
        try:
            content = json.loads(self.path.read_text())
            self.points = {point["signature"]: point for point in content["points"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path} holds no sweep results ({reason}): give another file, or remove it") from error

    def point(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The point of this signature: the one kept, else a new one, which is kept at once."""
        if key not in self.points:
            self.points[key] = {**make(), "signature": key}
            self._write()
        return self.points[key]

    def share(self) -> None:
        """Let all ranks that work together have the points of the first, which alone writes them."""
        self.points = ranks.once("reading results", lambda: self.points)

    def _write(self) -> None:
        if self.path is not None and ranks.is_first():
            write_file(self.path, json.dumps({"points": list(self.points.values())}, indent=1).encode())


@dataclass(frozen=True)
class Sweep:
    """Accuracy over budgets. baseline: accuracy of the float model; points: JSON values, one per model compiled."""

    baseline: dict[str, Any]
    points: list[dict[str, Any]]


@checked(OptionError, budgets=BudgetError, allocators=BudgetError)
def sweep(
    sessions: Mapping[str, Session],
    budgets: Sequence[Budget],
    allocators: Sequence[Allocator | None],
    measure: Callable[[nn.Module, str], Accuracy],
    results: Results,
    settings: str,
) -> Sweep:
    """Compile and measure every recipe at every budget with every allocator; what `results` has is not done again.

    Args:
        sessions: a session for each recipe, by the recipe's name.
        budgets: each is compiled with every recipe.
        allocators: what chooses the bits; None stands for the recipe's own.
        measure: a function that returns the accuracy of a model, given the model and a label for the progress display.
        results: keeps the points, so that a sweep that was stopped goes on.
        settings: signature of all that decides a point besides its pipeline (model, images, data). Budgets are checked
            before anything is calibrated.

    Ranks of a process group share the work out; `measure` is called on all of them. Raises as `fxquant.compile` does.
    """
    if not sessions or not budgets or not allocators:
        raise OptionError("a sweep needs at least one recipe, one budget and one allocator (None for the recipe's own)")
    with ranks.together(lambda: {"recipes": list(sessions), "budgets": list(map(str, budgets)), "settings": settings}):
        return _sweep(sessions, budgets, allocators, measure, results, settings)


def _sweep(
    sessions: Mapping[str, Session],
    budgets: Sequence[Budget],
    allocators: Sequence[Allocator | None],
    measure: Callable[[nn.Module, str], Accuracy],
    results: Results,
    settings: str,
) -> Sweep:
    results.share()
    planned = [(name, each, b, a) for name, each in sessions.items() for b in budgets for a in allocators]
    keys = [signature(settings, [repr(step) for step in each.pipeline(b, a)]) for _, each, b, a in planned]
    for key, (_, each, budget, allocator) in zip(keys, planned, strict=True):
        if key not in results.points:
            each.check(budget, allocator)
    first = next(iter(sessions.values()))
    baseline = results.point(
        signature(settings, "float32"), lambda: {"accuracy": measured(measure, first.float_model(), "float32")}
    )
    points = [
        results.point(key, partial(point_of, name, each, budget, allocator, measure))
        for key, (name, each, budget, allocator) in zip(keys, planned, strict=True)
    ]
    return Sweep(baseline["accuracy"], points)


def point_of(
    recipe: str,
    session: Session,
    budget: Budget,
    allocator: Allocator | None,
    measure: Callable[[nn.Module, str], Accuracy],
) -> dict[str, Any]:
    """One point of a sweep, JSON values.

    Args:
        recipe: what the point calls the recipe.
        session: of the recipe.
        budget, allocator: as `Session.compile` takes them.
        measure: see `sweep`.
    """
    compiled = session.compile(budget, allocator)
    allocation = compiled.allocation
    totals = compiled.report().totals
    return {
        "recipe": recipe,
        "allocator": "none" if allocation is None else allocation.solver,
        "status": "none" if allocation is None else allocation.status,
        "budget": str(budget),
        "accuracy": measured(measure, compiled, f"{recipe} at {budget}"),
        **totals.to_dict(),
    }


def measured(measure: Callable[[nn.Module, str], Accuracy], model: nn.Module, label: str) -> dict[str, Any]:
    """The accuracy of a model as a point keeps it: JSON values, with `right` as text, a 1 or a 0 for every image.

    Args:
        measure: see `sweep`.
        model: what is measured.
        label: for the progress display.
    """
    found = measure(model, label)
    if not isinstance(found, Accuracy):
        raise OptionError.for_type(f"`measure` returned {shown(found)}, not an Accuracy")
    return {**found.to_dict(), "right": "".join("01"[each] for each in found.right)}
