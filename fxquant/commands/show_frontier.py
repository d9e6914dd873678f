"""`fxquant frontier`: least predicted loss over budgets, and what a further 0.1 bit is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant import ranks
from fxquant.commands import options as o
from fxquant.commands.compiling import Compiling, compiling
from fxquant.commands.early_checks import check_output
from fxquant.commands.texts import parse_numbers


@compiling
def show_frontier(
    model: o.Model,
    axis: Annotated[
        str,
        typer.Option(
            help="mean_bits, mean_weight_bits, mean_activation_bits, weight_bytes, bit_operations or "
            "latency_ms, which needs --backend cpu-native."
        ),
    ] = "mean_bits",
    limits: Annotated[
        str | None, typer.Option(help="Budgets along it, comma-separated: bits, bytes or operations, such as 3,3.5,4.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Convex hull instead of the integer program.")] = False,
    realised: Annotated[
        bool, typer.Option("--realised", help="Measure every point's divergence from the float model too.")
    ] = False,
    calibration: o.Calibration = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    model_option: o.ModelOption = None,
    images: o.Images = 32,
    synthesis_steps: o.SynthesisSteps = None,
    recipe: o.Recipe = "best",
    given: Compiling = Compiling(),
    plot: Annotated[Path | None, typer.Option(help="Plot to write: .png, .svg or .pdf.")] = None,
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
    """Show what budgets are worth: the Pareto set of budget and predicted loss."""
    from fxquant.commands.console import emit, show
    from fxquant.report.plots import check_plot
    from fxquant.report.progress import RichProgress
    from fxquant.session.model_frontier import frontier

    check_output(plot)
    if plot is not None:
        check_plot(plot)
    wanted = parse_numbers(limits, "limits")
    given.options(recipe=recipe)  # which is read before anything takes long
    kept = o.cache_folder(cache, no_cache)
    named = o.named_model(model, weights, num_classes, model_option, given.device)
    preprocessing = o.with_options(named.preprocessing, image_size, crop_pct, crop_mode, mean, std, interpolation)
    data = o.calibration_images(calibration, images, preprocessing, given.seed, model == "embedded", synthesis_steps)
    with RichProgress() as progress:
        found = frontier(
            named.model, data, axis=axis, limits=wanted, exact=not fast, realised="divergence" if realised else None,
            **given.options(recipe=recipe, cache=kept, progress=progress),
        )  # fmt: skip
    if plot is not None and ranks.is_first():
        found.plot(plot)
    if json:
        emit(found.to_dict())
    else:
        show(found)
