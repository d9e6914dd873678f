"""`fxquant evaluate --coco`: average precision of a detector, float or quantized, on images with objects."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def evaluate_detector(
    model: str, detector: str | None, coco: Path | None, data: Path | None, limit: int | None, backend: str, json: bool
) -> None:
    """Measure average precision of boxes and, where there are any, of masks.

    Args:
        model: an artefact of a detector's parts, or module:factory of a float detector.
        detector: module:factory of the detector that an artefact goes into.
        coco: a COCO file.
        data: the folder of its pictures.
        limit: how many images at most; None: all.
        backend: how an artefact runs.
        json: whether JSON is printed.

    Raises DataError where something is missing, ModelError for what is no detector.
    """
    from fxquant.commands.console import emit, show
    from fxquant.data.model_sources import from_source, has_source
    from fxquant.detection.average_precision import average_precision
    from fxquant.detection.coco import CocoImages
    from fxquant.detection.compiled_detector import load_detector
    from fxquant.errors import DataError
    from fxquant.report.progress import RichProgress

    if coco is None or data is None:
        raise DataError("average precision needs objects and pictures: --coco instances.json --data FOLDER")
    is_artefact = Path(model).is_file()
    factory = detector if is_artefact else model
    if factory is None or not has_source(factory):
        raise DataError(
            "a detector is named by a function that builds it, module:factory: give it as the model, or with "
            "--detector where the model is an artefact"
        )
    built = from_source(factory, {})[0].eval()
    runs: nn.Module = load_detector(model, built, backend) if is_artefact else built
    images = CocoImages.open(coco, data)
    with RichProgress() as progress:
        found = average_precision(runs, images, limit=limit, progress=progress)
    if json:
        emit({"model": model, "data": images.name, **{kind: each.to_dict() for kind, each in found.items()}})
    else:
        show("\n".join(f"{kind} {each} on {images.name}" for kind, each in found.items()))
