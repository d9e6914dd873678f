"""Measuring the rows of a published table on a model: each one a session, its accuracy kept as soon as it is known.

    found = reproduce(published("mptq-vit-1"), model, calibration, measure, Results("points.json"))

One session is alive at a time: rows of one method and seed share it, whatever their budgets. `calibration` gives the
images of a method for a seed, so that several seeds calibrate on different images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from allocators.problem.budget import Budget
from fxquant import ranks
from fxquant.artefact.cache import signature
from fxquant.errors import OptionError
from fxquant.measure.accuracy import Accuracy, error_of_drop
from fxquant.reproduction.published import Method, Row, Table
from fxquant.session.session import Session
from fxquant.session.sweep import Results, measured, point_of
from fxquant.synthesis.pictures import Synthesis

Images = Tensor | Synthesis


@dataclass(frozen=True)
class Reproduced:
    """One row, the paper's and ours.

    Args:
        row: of the table.
        paper: its top-1, percent; None where it has none for this model.
        paper_drop: points below the paper's float model.
        by_seed: ours, percent, one a seed.
        standard_error: of one of ours over the choice of test images, in points.
        drop: points that ours lose against the float model on the same images, mean over seeds.
        drop_error: standard error of the drop over the choice of test images, paired; None where an older version kept
            the accuracies, and not which images were right.
    """

    row: Row
    paper: float | None
    paper_drop: float | None
    by_seed: tuple[float, ...]
    standard_error: float
    drop: float
    drop_error: float | None

    @property
    def top1(self) -> float:
        """Mean over seeds, percent."""
        return statistics.mean(self.by_seed)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, in points; None for one seed."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None

    @property
    def gap(self) -> float | None:
        """How many points less ours drop than the paper's; models and images differ, so drops are compared.

        Its standard error is that of the drop, since the paper's 50,000 images add next to nothing.
        """
        return None if self.paper_drop is None else self.paper_drop - self.drop


def wanted_rows(table: Table, names: Sequence[str] = ()) -> tuple[Row, ...]:
    """Rows whose method's name, or method and budget, has one of these texts in it; all without any.

    A text that is the whole of one row's method and budget means this row alone. Raises OptionError for a text that no
    row has.
    """
    if not names:
        return table.rows
    rows = {f"{row.method.name} {row.budget}": row for row in table.rows}
    chosen = {name: [name] if name in rows else [label for label in rows if name in label] for name in names}
    if strange := [name for name, labels in chosen.items() if not labels]:
        known = ", ".join(dict.fromkeys(row.method.name for row in table.rows))
        raise OptionError(f"no row of {table.name} is called {', '.join(strange)}; its methods are {known}")
    return tuple(row for label, row in rows.items() if any(label in labels for labels in chosen.values()))


def reproduce(
    table: Table,
    model: nn.Module,
    calibration: Callable[[Method, int], Images],
    measure: Callable[[nn.Module, str], Accuracy],
    results: Results,
    *,
    rows: Sequence[Row],
    column: str | None,
    seeds: Sequence[int] = (0,),
    settings: str = "",
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[Reproduced]]:
    """Accuracy of the float model, and the rows that are not absent.

    Args:
        table: see `published`.
        model: what is quantized.
        calibration: the images of a method for a seed.
        measure: the accuracy of a model, given it and a label for the progress display.
        results: keeps every accuracy, so that a run that was stopped goes on.
        rows: of the table, see `wanted_rows`.
        column: the paper's name of the model; None where it has no numbers of it.
        seeds: of calibration and of every random draw.
        settings: signature of all that decides an accuracy besides the pipeline, the images and the seed.
        options: of every session, see `SessionOptions`.

    Ranks of a process group share the work out; `measure` is called on all of them. Raises as `fxquant.compile` does.
    """
    named = [f"{row.method.name} {row.budget}" for row in rows]
    with ranks.together(lambda: {"table": table.name, "rows": named, "seeds": list(seeds), "settings": settings}):
        results.share()
        given: dict[str, Any] = {**(options or {}), **table.options}
        baseline = results.point(
            signature(settings, "float32"), lambda: {"accuracy": measured(measure, model, "the float model")}
        )["accuracy"]
        present = [row for row in rows if row.method.recipe is not None]
        accuracies: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for seed in seeds:
            for name in dict.fromkeys(row.method.name for row in present):
                of_method = [row for row in present if row.method.name == name]
                method = of_method[0].method
                images = calibration(method, seed)
                session = Session(model, images, **{**given, "recipe": method.recipe, "seed": seed})
                used = images if isinstance(images, Tensor) else repr(images)
                for row in of_method:
                    budget = Budget.parse(row.budget)
                    key = signature(settings, used, seed, [repr(step) for step in session.pipeline(budget)])
                    point = results.point(key, partial(point_of, name, session, budget, None, measure))
                    accuracies.setdefault((name, row.budget), []).append(point["accuracy"])
        return baseline, [
            _reproduced(row, table, column, baseline, accuracies[row.method.name, row.budget]) for row in present
        ]


def _reproduced(
    row: Row, table: Table, column: str | None, baseline: dict[str, Any], found: list[dict[str, Any]]
) -> Reproduced:
    paper = row.top1.get(column, math.nan) if column is not None else math.nan
    has_paper = column is not None and not math.isnan(paper)
    by_seed = tuple(accuracy["top1"] for accuracy in found)
    return Reproduced(
        row,
        paper if has_paper else None,
        table.float_top1[column] - paper if has_paper and column is not None else None,
        by_seed,
        found[0]["standard_error"],
        baseline["top1"] - statistics.mean(by_seed),
        error_of_drop(*right) if (right := _right(baseline, found)) else None,
    )


def _right(baseline: dict[str, Any], found: list[dict[str, Any]]) -> tuple[list[bool], list[list[bool]]] | None:
    """Of every image, whether the float model was right, and whether ours was, one list a seed; None if not known."""
    kept = [accuracy.get("right", "") for accuracy in (baseline, *found)]
    if not all(kept):
        return None
    before, *after = ([digit == "1" for digit in text] for text in kept)
    return before, after
