"""`fxquant evaluate`: top-1 of an artefact or a float model on labelled images, or average precision of a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fxquant.commands import options as o
from fxquant.commands.early_checks import is_artefact, refuse_unused
from passes.lower.lower import SIMULATED


def evaluate_model(
    model: Annotated[str, typer.Argument(help='An artefact (.fxq), a timm architecture, or "embedded".')],
    data: o.Data = None,
    classes: o.Classes = None,
    labels: o.Labels = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    model_option: o.ModelOption = None,
    limit: o.Limit = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at a time; 64, on a CPU fewer large ones, if not given.")
    ] = None,
    device: o.Device = "cpu",
    image_size: o.ImageSize = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    mean: o.Mean = None,
    std: o.Std = None,
    interpolation: o.Interpolation = None,
    backend: Annotated[str, typer.Option(help=f"How an artefact runs: {o.BACKENDS_HELP}.")] = SIMULATED,
    coco: Annotated[
        Path | None,
        typer.Option(help="A COCO file of objects in the pictures of --data: average precision of a detector."),
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="module:factory of the detector that an artefact of its parts goes into.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Measure top-1 accuracy, or a detector's average precision, with the number of images and the standard error.

    An artefact is first held against the answers that it holds.
    """
    if coco is not None or detector is not None:
        from fxquant.commands.evaluate_detector import evaluate_detector

        refuse_unused(
            {
                "--classes": classes, "--labels": labels, "--image-size": image_size, "--crop-pct": crop_pct,
                "--crop-mode": crop_mode, "--mean": mean, "--std": std, "--interpolation": interpolation,
            },
            "a detector takes classes from the COCO file, and prepares pictures itself",
        )  # fmt: skip
        evaluate_detector(
            model, detector=detector, coco=coco, data=data, weights=weights, num_classes=num_classes,
            options=model_option, limit=limit, device=device, backend=backend, json=json,
        )  # fmt: skip
        return
    from fxquant.commands.console import emit, show
    from fxquant.data.preprocessing import Preprocessing
    from fxquant.errors import DataError
    from fxquant.measure.accuracy import evaluate
    from fxquant.report.progress import RichProgress
    from fxquant.session.compiled import load

    runs: Any
    if is_artefact(model):
        given: dict[str, Any] = {"--weights": weights, "--num-classes": num_classes, "--model-option": model_option}
        refuse_unused(given, f"{model} is an artefact, which brings its own weights")
        runs = load(model, backend).to(o.device_of_run(device))
        runs.check_answers()
        is_embedded = runs.card.get("model") == "embedded"
        if "preprocessing" not in runs.card:
            raise DataError(
                f"{model} does not say how its images were preprocessed: compile it with `fxquant compile`, or pass "
                f'card={{"preprocessing": Preprocessing(...).to_dict()}} to fxquant.compile'
            )
        preprocessing = Preprocessing.from_dict(runs.card["preprocessing"])
    else:
        given = {"--backend": None if backend == SIMULATED else backend}
        refuse_unused(given, f"{model} is a float model, and no artefact (.fxq)")
        named = o.named_model(model, weights, num_classes, model_option, device)
        runs, preprocessing, is_embedded = named.model, named.preprocessing, model == "embedded"
    preprocessing = o.with_options(preprocessing, image_size, crop_pct, crop_mode, mean, std, interpolation)
    images = o.labelled_images(data, preprocessing, is_embedded, classes, labels)
    with RichProgress() as progress:
        accuracy = evaluate(runs, images, batch_size=batch_size, limit=limit, progress=progress)
    if json:
        emit({"model": model, "data": images.name, **accuracy.to_dict(), "preprocessing": preprocessing.to_dict()})
    else:
        how = "" if accuracy.labels == "as given" else f"; classes {accuracy.labels}"
        show(f"top-1 {accuracy} on {images.name}{how}")
