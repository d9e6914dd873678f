"""`fxquant synthesize`: calibration images from the model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant import ranks
from fxquant.commands import options as o
from fxquant.commands.early_checks import check_ending, check_output


def synthesize_images(
    model: o.Model,
    out: Annotated[Path, typer.Option(help="Images to write, .npz; --calibration reads them back.")],
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    model_option: o.ModelOption = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 32,
    steps: Annotated[int | None, typer.Option(min=1, help=o.STEPS_HELP)] = None,
    learning_rate: Annotated[float, typer.Option(help="Of Adam; 0.25 is the paper's for Swin.")] = 0.2,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet to write, .png, to look at.")] = None,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 8,
    device: o.Device = "cpu",
    cache: o.CacheFolder = None,
    no_cache: o.NoCache = False,
    image_size: o.ImageSize = None,
    mean: o.Mean = None,
    std: o.Std = None,
    json: o.Json = False,
) -> None:
    """Make calibration images from a model, without data (PSAQ-ViT)."""
    import io
    import time

    import numpy as np

    from fxquant.artefact.container import write_file
    from fxquant.commands.console import emit, say
    from fxquant.report.progress import RichProgress
    from fxquant.synthesis.sheet import write_sheet
    from fxquant.synthesis.synthesize import synthesize

    check_ending(out, ".npz")
    check_ending(sheet, ".png")
    check_output(out, sheet)
    kept = o.cache_folder(cache, no_cache)
    named = o.named_model(model, weights, num_classes, model_option, device)
    preprocessing = o.with_options(named.preprocessing, image_size, None, None, mean, std, None)
    options = o.synthesis(preprocessing, count, steps, learning_rate)
    started_s = time.perf_counter()
    with RichProgress() as progress:
        images = synthesize(named.model, options, seed=seed, batch_size=batch_size, cache=kept, progress=progress)
    seconds = time.perf_counter() - started_s
    if not ranks.is_first():
        return
    content = io.BytesIO()
    np.savez_compressed(content, images=images.float().cpu().numpy())
    write_file(out, content.getvalue())
    say(f"{out}: {options.described(seed)}, {seconds:.0f} s")
    if sheet is not None:
        write_sheet(sheet, images, preprocessing.mean, preprocessing.std)
        say(f"{sheet}: all of them, to look at")
    if json:
        emit({"out": str(out), "calibration": options.described(seed), "shape": list(images.shape), "seconds": seconds})
