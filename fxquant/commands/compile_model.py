"""`fxquant compile`: a model and a budget in, an artefact out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant import ranks
from fxquant.commands import options as o
from fxquant.commands.compiling import Compiling, compiling
from fxquant.commands.early_checks import PAGE, check_output


@compiling
def compile_model(
    model: o.Model,
    budget: Annotated[str, typer.Argument(help='"W4A4", "W3.5A5", "6MB", "W4, 2GBOPs", "W4A8, 5ms", ...')],
    calibration: o.Calibration = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    model_option: o.ModelOption = None,
    images: o.Images = 32,
    synthesis_steps: o.SynthesisSteps = None,
    recipe: o.Recipe = "best",
    allocator: o.AllocatorName = None,
    given: Compiling = Compiling(),
    out: Annotated[Path | None, typer.Option(help="Artefact to write, such as model.fxq.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Report to write: .html is a page for a browser, any other name JSON.")
    ] = None,
    cache: o.CacheFolder = None,
    no_cache: o.NoCache = False,
    picture: Annotated[Path | None, typer.Option(help="Picture of the bits to write, .svg or .dot.")] = None,
    image_size: o.ImageSize = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    mean: o.Mean = None,
    std: o.Std = None,
    interpolation: o.Interpolation = None,
    json: o.Json = False,
) -> None:
    """Quantize a Vision Transformer within a budget."""
    from torch import Tensor

    from allocators.problem.budget import Budget
    from fxquant.artefact.container import write_file
    from fxquant.commands.console import emit, say, show, to_json
    from fxquant.report.picture import check_picture
    from fxquant.report.progress import RichProgress
    from fxquant.session.session import compile

    wanted, chosen = Budget.parse(budget), o.allocator_or_none(allocator)
    given.options(recipe=recipe)  # which is read before anything takes long
    check_output(out, report, picture)
    if picture is not None:
        check_picture(picture)
    kept = o.cache_folder(cache, no_cache)
    named = o.named_model(model, weights, num_classes, model_option, given.device)
    preprocessing = o.with_options(named.preprocessing, image_size, crop_pct, crop_mode, mean, std, interpolation)
    found = o.calibration_images(calibration, images, preprocessing, given.seed, model == "embedded", synthesis_steps)
    data = calibration.name if calibration else "embedded" if isinstance(found, Tensor) else "none"
    card = {
        **named.card,
        "preprocessing": preprocessing.to_dict(),
        "recipe": given.label(recipe),
        "calibration_data": data,
    }
    with RichProgress() as progress:
        options = given.options(recipe=recipe, progress=progress, cache=kept, card=card)
        quantized = compile(named.model, wanted, calibration=found, allocator=chosen, **options)
    if not ranks.is_first():
        return
    if any(entry.notes.get("recalled") for entry in quantized.journal.entries):
        say(f"calibrated and searched before: recalled from {kept}")
    summary = quantized.report()
    if out is not None:
        quantized.save(out)
        say(f"{out}: {out.stat().st_size / 1e6:.3f} MB")
    if report is not None:
        is_page = report.suffix.lower() in PAGE
        write_file(report, (summary.to_html() if is_page else to_json(summary.to_dict())).encode())
    if picture is not None:
        quantized.draw(picture)
    if json:
        emit(summary.to_dict())
    else:
        show(summary)
    if out is None:
        say("nothing was kept: give --out FILE.fxq to write the artefact")
