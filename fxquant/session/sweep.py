"""Many budgets, one calibration: everything before AllocateBits runs once, and each point starts from a copy.

    prepared = Prepared(model, calibration)
    for budget in ("W8A8", "W4A4"):
        quantized = prepared.compile(budget)

Accuracy over all of them, kept in a file after every point: `sweep`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from allocators.allocator import Allocator
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from fxquant.artefact.cache import Cache, signature
from fxquant.artefact.container import write_file
from fxquant.checks.arguments import json_values, shown
from fxquant.checks.hints import checked
from fxquant.errors import BY_ARGUMENT, BudgetError, DataError, OptionError
from fxquant.measure.accuracy import Accuracy
from fxquant.session.compiled import Compiled
from fxquant.session.model_source import CalibrationSource
from fxquant.session.session import compiled_from
from fxquant.synthesis.synthesize import Synthesis
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.check_budget import check_budget
from passes.lower.lower import SIMULATED
from passes.pipeline.contract import Journal, ProgressReporter, check_images, reporter_of
from passes.pipeline.pipeline import Pipeline
from passes.pipeline.search_cache import run_prefix, split
from passes.recipes import recipe as recipe_named


class Prepared:
    """A model calibrated and searched once, to be compiled for any number of budgets and allocators.

    cache: folder that keeps the calibrated and searched model for other processes. options: of the recipe (overrides,
    first_last_bits, fully_quantized, ...). What `compile` returns equals what `fxquant.compile` returns for the same
    budget, allocator and options.
    """

    @checked(OptionError, **BY_ARGUMENT)
    def __init__(
        self,
        model: nn.Module,
        calibration: Tensor | Synthesis | None = None,
        *,
        recipe: str = "best",
        seed: int = 0,
        batch_size: int = 8,
        progress: ProgressReporter | None = None,
        cache: str | PathLike[str] | None = None,
        card: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Check the images; nothing runs before `check` or `compile`. Raises CalibrationError, PipelineError."""
        if isinstance(calibration, Tensor):
            check_images(calibration)
        self.model, self.card = model, json_values("card", card or {}, OptionError)
        self._recipe, self._options = recipe_named(recipe), options
        self.pipeline("W8A8")  # refuses options that the recipe does not take
        self._source = CalibrationSource(model, calibration, seed, batch_size, Cache(cache), reporter_of(progress))

    @property
    def calibration(self) -> Tensor:
        """The calibration images, float (N, C, H, W); synthesised when first asked for where none were given."""
        return self._source.images

    @checked(BudgetError)
    def pipeline(self, budget: Any, allocator: Allocator | None = None) -> Pipeline:
        """The whole pipeline of one point."""
        return self._recipe(budget, allocator=allocator, **self._options)

    def check(self, budget: Any, allocator: Allocator | None = None) -> None:
        """Refuse a budget that cannot be met, before anything is calibrated. Raises as `fxquant.compile` does."""
        check_budget(self.pipeline(budget, allocator), self._source.with_roles)

    @cached_property
    def _searched(self) -> GraphModule:
        """The graph as it is before bits are allocated; no budget has any say in it."""
        prefix, _ = split(self.pipeline("W8A8"))
        return run_prefix(prefix, self._source.traced, self._source.context)

    @checked(BudgetError)
    def cost_table(self, budget: Any = "W8A8", lowest: Budget | None = None) -> CostTable:
        """The allocation problem, with overrides and policies applied; calibrates on the first call only.

        budget: of it only which quantities are limited matters: times are measured where it limits the latency. Widths
        that the recipe avoids are left out where the budget `lowest` can be met without them, and by default.
        """
        pipeline = self.pipeline(budget)
        _, rest = split(pipeline)
        found = rest[: rest.position(AllocateBits)].run(self._searched, self._source.context)
        allocate = next(step for step in pipeline if isinstance(step, AllocateBits))
        return allocate.without_narrow(allocate.cost_table(found), lowest)

    def compile(self, budget: Any, allocator: Allocator | None = None) -> Compiled:
        """The model quantized within one budget; calibrates on the first call only."""
        self.check(budget, allocator)
        pipeline = self.pipeline(budget, allocator)
        _, rest = split(pipeline)
        searched = self._searched
        context = replace(self._source.context, journal=Journal(list(self._source.context.journal.entries)))
        quantized = rest.run(searched, context)
        backend = self._options.get("backend", SIMULATED)
        journal = context.journal
        return compiled_from(self.model, self._source, pipeline, quantized, journal, backend=backend, card=self.card)


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
            raise DataError(f"{path} holds no sweep results ({error!r}): give another file, or remove it") from error

    def point(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The point of this signature: the one kept, else a new one, which is kept at once."""
        if key not in self.points:
            self.points[key] = {**make(), "signature": key}
            self._write()
        return self.points[key]

    def _write(self) -> None:
        if self.path is not None:
            write_file(self.path, json.dumps({"points": list(self.points.values())}, indent=1).encode())


@dataclass(frozen=True)
class Sweep:
    """Accuracy over budgets. baseline: accuracy of the float model; points: JSON values, one per model compiled."""

    baseline: dict[str, Any]
    points: list[dict[str, Any]]


@checked(OptionError, budgets=BudgetError, allocators=BudgetError)
def sweep(
    prepared: Mapping[str, Prepared],
    budgets: Sequence[Budget],
    allocators: Sequence[Allocator | None],
    measure: Callable[[nn.Module, str], Accuracy],
    results: Results,
    settings: str,
) -> Sweep:
    """Compile and measure every recipe at every budget with every allocator; what `results` has is not done again.

    prepared: by recipe. allocators: None for the recipe's own. measure: accuracy of a model, shown under a label.
    settings: signature of all that decides a point besides its pipeline (model, images, data). Budgets are checked
    before anything is calibrated. Raises as `fxquant.compile` does.
    """
    if not prepared or not budgets or not allocators:
        raise OptionError("a sweep needs at least one recipe, one budget and one allocator (None for the recipe's own)")
    planned = [(name, each, b, a) for name, each in prepared.items() for b in budgets for a in allocators]
    keys = [signature(settings, [repr(step) for step in each.pipeline(b, a)]) for _, each, b, a in planned]
    for key, (_, each, budget, allocator) in zip(keys, planned, strict=True):
        if key not in results.points:
            each.check(budget, allocator)
    model = next(iter(prepared.values())).model
    baseline = results.point(signature(settings, "float32"), lambda: {"accuracy": _measured(measure, model, "float32")})
    points = [
        results.point(key, partial(_point, name, each, budget, allocator, measure))
        for key, (name, each, budget, allocator) in zip(keys, planned, strict=True)
    ]
    return Sweep(baseline["accuracy"], points)


def _point(
    recipe: str,
    prepared: Prepared,
    budget: Budget,
    allocator: Allocator | None,
    measure: Callable[[nn.Module, str], Accuracy],
) -> dict[str, Any]:
    compiled = prepared.compile(budget, allocator)
    allocation = compiled.allocation
    totals = compiled.report().totals
    return {
        "recipe": recipe,
        "allocator": "none" if allocation is None else allocation.solver,
        "status": "none" if allocation is None else allocation.status,
        "budget": str(budget),
        "accuracy": _measured(measure, compiled, f"{recipe} at {budget}"),
        **totals.to_dict(),
    }


def _measured(measure: Callable[[nn.Module, str], Accuracy], model: nn.Module, label: str) -> dict[str, Any]:
    found = measure(model, label)
    if not isinstance(found, Accuracy):
        raise OptionError.for_type(f"`measure` returned {shown(found)}, not an Accuracy")
    return found.to_dict()
