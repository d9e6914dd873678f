"""`fxquant sweep`: accuracy over budgets; calibrates and searches once a recipe, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxquant import ranks
from fxquant.commands import options as o
from fxquant.commands.compiling import Compiling, compiling
from fxquant.commands.early_checks import check_output

if TYPE_CHECKING:
    from torch import nn

    from fxquant.measure.accuracy import Accuracy
    from fxquant.report.render import Page
    from fxquant.session.sweep import Sweep


@compiling
def sweep_budgets(
    model: o.Model,
    budgets: Annotated[str, typer.Option(help='Separated by commas, or by ";" where a budget has commas.')],
    calibration: o.Calibration = None,
    data: o.Data = None,
    classes: o.Classes = None,
    labels: o.Labels = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    model_option: o.ModelOption = None,
    images: o.Images = 32,
    synthesis_steps: o.SynthesisSteps = None,
    recipe: Annotated[
        str, typer.Option(help=f"One or more of {o.RECIPE_HELP}", rich_help_panel=o.QUANTIZATION)
    ] = "best",
    allocator: Annotated[
        str | None, typer.Option(help=f"One or more of {o.ALLOCATOR_HELP}", rich_help_panel=o.QUANTIZATION)
    ] = None,
    given: Compiling = Compiling(),
    limit: o.Limit = None,
    results: Annotated[Path | None, typer.Option(help="JSON file of results; points already in it are kept.")] = None,
    cache: o.CacheFolder = None,
    no_cache: o.NoCache = False,
    plot: Annotated[Path | None, typer.Option(help="Plot to write: .png, .svg or .pdf.")] = None,
    image_size: o.ImageSize = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    mean: o.Mean = None,
    std: o.Std = None,
    interpolation: o.Interpolation = None,
    json: o.Json = False,
) -> None:
    """Measure accuracy over budgets, recipes and allocators."""
    from torch import Tensor

    from allocators.problem.budget import Budget
    from fxquant.artefact.cache import signature
    from fxquant.commands.console import emit, show
    from fxquant.measure.accuracy import evaluate
    from fxquant.report.plots import check_plot
    from fxquant.report.progress import RichProgress
    from fxquant.session.session import Session
    from fxquant.session.sweep import Results, sweep

    wanted = [Budget.parse(text.strip()) for text in budgets.split(";" if ";" in budgets else ",")]
    allocators = [o.allocator_or_none(name.strip()) for name in allocator.split(",")] if allocator else [None]
    recipes = [name.strip() for name in recipe.split(",")]
    options, *_ = [given.options(recipe=name) for name in recipes]  # which are read before anything takes long
    options.pop("recipe")
    check_output(results, plot)
    if plot is not None:
        check_plot(plot)
    kept, folder = Results(results), o.cache_folder(cache, no_cache)
    named = o.named_model(model, weights, num_classes, model_option, given.device)
    preprocessing = o.with_options(named.preprocessing, image_size, crop_pct, crop_mode, mean, std, interpolation)
    tested = o.labelled_images(data, preprocessing, model == "embedded", classes, labels)
    found = o.calibration_images(calibration, images, preprocessing, given.seed, model == "embedded", synthesis_steps)
    card = {**named.card, "preprocessing": preprocessing.to_dict()}
    data_used = found if isinstance(found, Tensor) else repr(found)
    known = [tested.name, tested.count, tested.labels, tested.names]
    settings = signature(named.model, data_used, card, repr(options), *known, limit)
    with RichProgress() as progress:
        sessions = {}
        for name in recipes:
            label = given.label(name)
            own = given.options(recipe=name, card={**card, "recipe": label}, progress=progress, cache=folder)
            sessions[label] = Session(named.model, found, **own)

        def measure(runs: nn.Module, label: str) -> Accuracy:
            return evaluate(runs, tested, limit=limit, progress=progress, label=f"evaluating {label}")

        done = sweep(sessions, wanted, allocators, measure, kept, settings)
    if plot is not None and ranks.is_first():
        _plot(plot, done)
    if json:
        emit({"model": model, "data": tested.name, "baseline": done.baseline, "points": done.points})
    else:
        show(_page(model, done))


def _page(model: str, done: Sweep) -> Page:
    from fxquant.report.render import Page
    from fxquant.report.sections import Cell, Table

    columns = ("recipe", "allocator", "budget", "top-1 %", "+/-", "W bits", "A bits", "MB", "BOPs G")
    first = done.points[0]
    rows = [
        ("float32", "", "", *_accuracy(done.baseline), "32", "32",
         f"{first['float_bytes'] / 1e6:.3f}", f"{first['float_bit_operations'] / 1e9:.3f}")
    ]  # fmt: skip
    for point in done.points:
        means = [point["mean_weight_bits"], point["mean_activation_bits"]]
        bits = ["-" if mean is None else f"{mean:.3f}" for mean in means]
        sizes = f"{point['model_bytes'] / 1e6:.3f}", f"{point['bit_operations'] / 1e9:.3f}"
        names = point["recipe"], point["allocator"], point["budget"]
        rows.append((*names, *_accuracy(point["accuracy"]), *bits, *sizes))
    cells = tuple(tuple(map(Cell, row)) for row in rows)
    title = f"Accuracy of {model} over budgets ({done.baseline['count']:,} images)"
    return Page(Table(title, columns, cells, frozenset({0, 1, 2})))


def _accuracy(found: dict[str, Any]) -> tuple[str, str]:
    return f"{found['top1']:.2f}", f"{found['standard_error']:.2f}"


def _plot(path: Path, done: Sweep) -> None:
    from fxquant.report.plots import PlotPoint, plot_accuracy

    points = []
    for point in done.points:
        means = [bits for bits in (point["mean_weight_bits"], point["mean_activation_bits"]) if bits is not None]
        line = f"{point['recipe']}, {point['allocator']}"
        accuracy = point["accuracy"]
        points.append(PlotPoint(line, sum(means) / len(means), accuracy["top1"], accuracy["standard_error"]))
    plot_accuracy(path, points, done.baseline["top1"])
