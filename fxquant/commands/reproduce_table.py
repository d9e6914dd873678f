"""`fxquant reproduce`: the rows of a paper's table on a model and images of yours, beside what the paper says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxquant.commands import options as o
from fxquant.commands.early_checks import check_output, refuse_unused
from fxquant.commands.table_rows import command, option_texts, with_options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fxquant.measure.accuracy import Accuracy
    from fxquant.report.render import Page
    from fxquant.reproduction.published import Method, Row, Table
    from fxquant.reproduction.reproduce import Reproduced
    from fxquant.synthesis.pictures import Synthesis


def reproduce_table(
    table: Annotated[str, typer.Argument(help="A table, such as mptq-vit-1; `fxquant list tables` has all.")],
    model: o.Model,
    calibration: o.Calibration = None,
    data: o.Data = None,
    classes: o.Classes = None,
    labels: o.Labels = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    model_option: o.ModelOption = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            help="Only rows whose method, or method and budget, has this in it: 'MPTQ-ViT W6A6'. The whole of both is "
            "one row alone. Repeatable."
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="The paper's name of the model, such as DeiT-T, where timm's does not say it.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="How many calibration images; as many as each method's paper if not given."),
    ] = None,
    synthesis_steps: o.SynthesisSteps = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds, from 0; each has calibration images of its own.")
    ] = 1,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of every row's recipe that has it: name=value, such as steps=200. Repeatable."),
    ] = None,
    backend: Annotated[str, typer.Option(help=f"How quantized models are run: {o.BACKENDS_HELP}.")] = "simulated",
    limit: o.Limit = None,
    device: o.Device = "cpu",
    results: Annotated[Path | None, typer.Option(help="JSON file of results; what is in it is not done again.")] = None,
    cache: o.CacheFolder = None,
    no_cache: o.NoCache = False,
    image_size: o.ImageSize = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    mean: o.Mean = None,
    std: o.Std = None,
    interpolation: o.Interpolation = None,
    json: o.Json = False,
) -> None:
    """Measure the rows of a paper's table: paper, ours, and the gap between what both lose."""
    from fxquant.artefact.cache import signature
    from fxquant.commands.console import emit, show
    from fxquant.errors import OptionError
    from fxquant.measure.accuracy import evaluate
    from fxquant.report.progress import RichProgress
    from fxquant.reproduction.published import published
    from fxquant.reproduction.reproduce import reproduce, wanted_rows
    from fxquant.session.compiled import Compiled
    from fxquant.session.sweep import Results
    from passes.lower.lower import SIMULATED, check_backend

    wanted = published(table)
    chosen = with_options(wanted_rows(wanted, rows or ()), option or [])
    found_column = wanted.column(column or model)
    if column is not None and found_column is None:
        raise OptionError(f"{table} has no column {column!r}; it has {', '.join(wanted.float_top1)}")
    check_backend(backend)
    check_output(results)
    kept, folder = Results(results), o.cache_folder(cache, no_cache)
    named = o.named_model(model, weights, num_classes, model_option, device)
    preprocessing = o.with_options(named.preprocessing, image_size, crop_pct, crop_mode, mean, std, interpolation)
    is_embedded = model == "embedded"
    tested = o.labelled_images(data, preprocessing, is_embedded, classes, labels)

    def makes_images(row: Row) -> bool:
        is_without = calibration is None and not is_embedded
        return row.method.recipe is not None and (row.method.made_images or is_without)

    if not any(map(makes_images, chosen)):
        refuse_unused({"--synthesis-steps": synthesis_steps}, "no row is calibrated on images made from the model")

    def calibrated(method: Method, seed: int) -> Tensor | Synthesis:
        count = images or method.images
        if method.made_images:
            return o.synthesis(preprocessing, count, synthesis_steps)
        steps = None if is_embedded or calibration is not None else synthesis_steps
        return o.calibration_images(calibration, count, preprocessing, seed, is_embedded, steps)

    _check_images(calibration, [images or row.method.images for row in chosen if _is_calibrated(row)], is_embedded)
    card = {**named.card, "preprocessing": preprocessing.to_dict()}
    known = [tested.name, tested.count, tested.labels, tested.names]
    settings = signature(named.model, card, *known, limit, backend)
    with RichProgress() as progress:

        def measure(runs: nn.Module, label: str) -> Accuracy:
            if backend != SIMULATED and isinstance(runs, Compiled):
                runs = runs.lowered(backend)
            return evaluate(runs, tested, limit=limit, progress=progress, label=f"evaluating {label}")

        baseline, done = reproduce(
            wanted,
            named.model,
            calibrated,
            measure,
            kept,
            rows=chosen,
            column=found_column,
            seeds=range(seeds),
            settings=settings,
            options={"card": card, "cache": folder, "progress": progress},
        )
    same: dict[str, Any] = {
        "--calibration": calibration, "--data": data, "--classes": classes, "--labels": labels, "--weights": weights,
        "--num-classes": num_classes, "--model-option": model_option, "--limit": limit, "--image-size": image_size,
        "--crop-pct": crop_pct, "--crop-mode": crop_mode, "--mean": mean, "--std": std,
        "--interpolation": interpolation, "--device": None if device == "cpu" else device,
    }  # fmt: skip
    here = {"--backend": None if backend == SIMULATED else backend, "--seeds": None if seeds == 1 else seeds}
    commands = [
        command(
            wanted, each.row, model, images,
            same | {"--synthesis-steps": synthesis_steps if makes_images(each.row) else None},
            here | {"--column": column, "--option": option_texts(each.row, option or [])},
        )
        for each in done
    ]  # fmt: skip
    absent = {row.method.name: row.method.absent for row in chosen if row.method.absent}
    if json:
        emit(
            {
                "table": table,
                "title": wanted.title,
                "source": wanted.source,
                "model": model,
                "column": found_column,
                "data": tested.name,
                "baseline": baseline,
                "seeds": seeds,
                "absent": absent,
                "rows": [_values(each, line) for each, line in zip(done, commands, strict=True)],
            }
        )
    else:
        show(_page(wanted, found_column, tested.name, baseline, done, commands, absent))


def _is_calibrated(row: Row) -> bool:
    return row.method.recipe is not None and not row.method.made_images


def _check_images(calibration: Path | None, wanted: list[int], is_embedded: bool) -> None:
    """Raise DataError where there are fewer calibration images than a row takes, before any row is measured."""
    from fxquant.data import embedded
    from fxquant.data.image_folders import images_by_folder
    from fxquant.errors import DataError

    most = max(wanted, default=1)
    if calibration is None and is_embedded:
        embedded.calibration_images(most)
    elif calibration is not None and calibration.is_dir():
        known = len(images_by_folder(calibration)[0])
        if most > known:
            raise DataError(f"{calibration} has {known} images, and a row takes {most}: say how many by --images")


def _values(found: Reproduced, line: str) -> dict[str, Any]:
    """One row, JSON values."""
    return {
        "method": found.row.method.name,
        "budget": found.row.budget,
        "paper": found.paper,
        "paper_drop": found.paper_drop,
        "top1": found.top1,
        "by_seed": list(found.by_seed),
        "standard_error": found.standard_error,
        "spread": found.spread,
        "drop": found.drop,
        "drop_standard_error": found.drop_error,
        "gap": found.gap,
        "differs": found.row.method.differs,
        "command": line,
    }


def _page(
    table: Table,
    column: str | None,
    data: str,
    baseline: dict[str, Any],
    done: list[Reproduced],
    commands: list[str],
    absent: dict[str, str],
) -> Page:
    from fxquant.report import sections
    from fxquant.report.render import Page

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    float_paper = None if column is None else table.float_top1[column]
    of_float = number(float_paper), "", number(baseline["top1"]), number(baseline["standard_error"])
    rows = [("float", "", *of_float, "", "", "", "")]
    for each in done:
        ours = number(each.top1), number(each.standard_error), number(each.spread)
        lost = number(each.drop), number(each.drop_error), number(each.gap)
        rows.append((each.row.method.name, each.row.budget, number(each.paper), number(each.paper_drop), *ours, *lost))
    named = f"paper {column or ''}".rstrip()
    columns = ("method", "budget", named, "drop", "ours", "+/-", "over seeds", "drop", "+/-", "gap")
    cells = tuple(tuple(map(sections.Cell, row)) for row in rows)
    pieces: list[sections.Lines | sections.Table] = [sections.Table(table.title, columns, cells, frozenset({0, 1}))]
    notes = [
        ("source", table.source),
        ("ours", f"{baseline['count']:,} images of {data}; +/- is the standard error over images, a drop's is paired"),
        ("gap", "how many points less ours loses against its float model than the paper's against its own"),
    ]
    pieces.append(sections.Lines("What is compared", tuple(notes)))
    if absent:
        pieces.append(sections.Lines("Absent", tuple(absent.items())))
    labels = [f"{each.row.method.name} {each.row.budget}" for each in done]
    pieces.append(sections.Lines("Commands", tuple(zip(labels, commands, strict=True))))
    return Page(*pieces)
