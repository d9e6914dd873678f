"""`fxquant evaluate --coco`: average precision of a detector, float or quantized, on images with objects."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def evaluate_detector(
    model: str,
    *,
    detector: str | None,
    coco: Path | None,
    data: Path | None,
    weights: Path | None,
    num_classes: int | None,
    options: list[str] | None,
    limit: int | None,
    device: str,
    backend: str,
    json: bool,
) -> None:
    """Measure average precision of boxes and, where there are any, of masks.

    Args:
        model: an artefact of a detector's parts, or module:factory of a float detector.
        detector: module:factory of the detector that an artefact goes into.
        coco: a COCO file.
        data: the folder of its pictures.
        weights: a file of a float detector's weights; None: those that it is built with.
        num_classes: for the function that builds the detector; None: as it is there.
        options: name=value, for that function.
        limit: how many images at most, evenly spread over all; None: all.
        device: where the detector runs.
        backend: how an artefact runs.
        json: whether JSON is printed.

    Raises DataError where something is missing or would do nothing, ModelError for what is no detector.
    """
    from fxquant.commands.console import emit, show
    from fxquant.commands.early_checks import is_artefact, refuse_unused
    from fxquant.commands.options import device_of_run, named_model
    from fxquant.data.model_sources import has_source
    from fxquant.detection.average_precision import average_precision
    from fxquant.detection.coco import CocoImages
    from fxquant.detection.compiled_detector import load_detector
    from fxquant.errors import DataError
    from fxquant.report.progress import RichProgress
    from passes.lower.lower import SIMULATED

    if coco is None or data is None:
        raise DataError("average precision needs objects and pictures: --coco instances.json --data FOLDER")
    is_quantized = is_artefact(model)
    if is_quantized:
        refuse_unused({"--weights": weights}, f"{model} is an artefact, which brings its own weights")
    else:
        given = {"--detector": detector, "--backend": None if backend == SIMULATED else backend}
        refuse_unused(given, f"{model} is a float detector, and no artefact (.fxq)")
    factory = detector if is_quantized else model
    if factory is None or not has_source(factory):
        raise DataError(
            "a detector is named by a function that builds it, module:factory: give it as the model, or with "
            "--detector where the model is an artefact"
        )
    built = named_model(factory, weights, num_classes, options, "cpu" if is_quantized else device).model
    runs: nn.Module = load_detector(model, built, backend).to(device_of_run(device)) if is_quantized else built
    images = CocoImages.open(coco, data)
    with RichProgress() as progress:
        found = average_precision(runs, images, limit=limit, progress=progress)
    if json:
        emit({"model": model, "data": images.name, **{kind: each.to_dict() for kind, each in found.items()}})
    else:
        show("\n".join(f"{kind} {each} on {images.name}" for kind, each in found.items()))
