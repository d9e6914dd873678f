"""COCO's average precision of a detector, of boxes and, where it gives masks, of masks.

AP is the mean over categories and over thresholds of overlap 0.50, 0.55, ..., 0.95 (Lin et al., 2014), by pycocotools;
in points, 0 to 100. Its standard error is that over the choice of images: AP of images drawn anew with replacement,
`RESAMPLINGS` times from one seed, so that two detectors measured on the same images can be compared draw by draw.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxquant import ranks
from fxquant.artefact.cache import signature
from fxquant.checks.hints import checked
from fxquant.data.images import spread
from fxquant.detection.coco import CocoImages, pycocotools, quiet
from fxquant.errors import DataError, ModelError, OptionError
from fxquant.graph.nodes import device_of
from passes.pipeline.progress import ProgressReporter, reporter_of

RESAMPLINGS, _SEED = 50, 0
MOST = 100  # detections of an image that count
_ALL = [[0, 1e10]]  # areas in square pixels
_KINDS = {"box": "bbox", "mask": "segm"}  # pycocotools' names


@dataclass(frozen=True)
class Precision:
    """Average precision of one kind, in points.

    Args:
        ap: mean over thresholds of overlap 0.50 to 0.95.
        ap50, ap75: at one of them.
        resampled: `ap` of images drawn anew.
        images: how many images there are.
        objects: how many objects are in them.
    """

    ap: float
    ap50: float
    ap75: float
    resampled: tuple[float, ...]
    images: int
    objects: int

    @property
    def standard_error(self) -> float:
        """Of `ap`, over the choice of images, in points."""
        return float(np.std(self.resampled, ddof=1))

    def below(self, other: Precision) -> tuple[float, float]:
        """How many points this is under another on the same images, and the standard error of that.

        Raises OptionError where the images are not the same in number, or their objects.
        """
        if (self.images, self.objects) != (other.images, other.objects):
            raise OptionError(f"{self} and {other} are of different images: measure both on the same")
        pairs = np.subtract(other.resampled, self.resampled)
        return other.ap - self.ap, float(np.std(pairs, ddof=1))

    def __str__(self) -> str:
        """`41.2 AP +/- 1.3 (50 images, 108 objects)`."""
        return f"{self.ap:.1f} AP +/- {self.standard_error:.1f} ({self.images:,} images, {self.objects:,} objects)"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "ap": self.ap, "ap50": self.ap50, "ap75": self.ap75, "standard_error": self.standard_error,
            "images": self.images, "objects": self.objects, "resampled": list(self.resampled),
        }  # fmt: skip


@checked(DataError, model=ModelError, progress=OptionError)
@torch.inference_mode()
def average_precision(
    model: nn.Module,
    data: CocoImages,
    *,
    limit: int | None = None,
    progress: ProgressReporter | None = None,
    label: str = "detecting",
) -> dict[str, Precision]:
    """AP of a detector: {"box": ...} and, where it gives masks and all objects have outlines, {"mask": ...}.

    One image is in memory at a time. Ranks of a process group share the images out.

    Args:
        model: on any device, where pictures go one by one; called with a list of pictures (3, H, W), returns for each a
            dict with boxes (x1, y1, x2, y2), labels and scores, and perhaps masks (N, 1, H, W) of probabilities, as
            torchvision's detectors do.
        data: images with objects.
        limit: how many images at most, evenly spread over all; None: all.
        progress: shows how far it is; None: nothing is shown.
        label: how the progress display calls this step.

    Raises MissingExtraError without pycocotools, ModelError for a model that gives something else, DataError where the
    images have no objects, of which a precision could be.
    """
    pycocotools("cocoeval")
    chosen = spread(len(data), limit)
    if not any(True for index in chosen for _ in data.objects(index)):
        raise DataError(f"the {len(chosen):,} images of {data.name} have no objects: give others, or a higher limit")

    device = device_of(model)

    def detected(index: int) -> dict[str, list[dict[str, Any]]]:
        (found,) = _checked(model([data.image(index).to(device)]))
        gives_masks = "masks" in found and data.has_shapes
        masks = {"mask": _mask_rows(found, data, index)} if gives_masks else {}
        return {"box": _box_rows(found, data, index), **masks}

    def measured() -> dict[str, Precision]:
        kinds = [kind for kind in _KINDS if any(kind in each for each in detections)]
        rows = {kind: [row for each in detections for row in each.get(kind, [])] for kind in kinds}
        return {kind: _precision(data, rows[kind], _KINDS[kind], chosen) for kind in kinds}

    given = {"limit": limit, "images": (data.name, len(data))}
    with ranks.together(lambda: {**given, "model": signature(model)}):
        task = reporter_of(progress).track(label, len(chosen))
        detections = ranks.dealt(label, detected, chosen, advance=task.advance)
        task.close()
        return ranks.once("measuring precision", measured)


def _checked(output: Any) -> list[dict[str, Tensor]]:
    is_list = isinstance(output, list) and len(output) == 1 and isinstance(output[0], dict)
    if not is_list or not {"boxes", "labels", "scores"} <= set(output[0]):
        raise ModelError(
            "the model does not give what a detector does: for a list of pictures a list of dicts with boxes, labels "
            "and scores"
        )
    return output  # type: ignore[no-any-return]


def _rows(found: dict[str, Tensor], data: CocoImages, index: int) -> list[dict[str, Any]]:
    labels = found["labels"].tolist()
    if labels and not 1 <= min(labels) <= max(labels) <= len(data.category_ids):
        raise ModelError(
            f"the detector gives labels up to {max(labels)}, and {data.name} has {len(data.category_ids)} categories"
        )
    image = data.image_ids[index]
    pairs = zip(labels, found["scores"].tolist(), strict=True)
    return [{"image_id": image, "category_id": data.category_ids[i - 1], "score": score} for i, score in pairs]


def _box_rows(found: dict[str, Tensor], data: CocoImages, index: int) -> list[dict[str, Any]]:
    corners = found["boxes"].double()
    sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    return [{**row, "bbox": box} for row, box in zip(_rows(found, data, index), sides, strict=True)]


def _mask_rows(found: dict[str, Tensor], data: CocoImages, index: int) -> list[dict[str, Any]]:
    encode = pycocotools("mask").encode
    binary = (found["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
    codes = [encode(np.asfortranarray(mask)) for mask in binary]
    return [{**row, "segmentation": code} for row, code in zip(_rows(found, data, index), codes, strict=True)]


def _precision(data: CocoImages, rows: list[dict[str, Any]], kind: str, chosen: list[int]) -> Precision:
    images, count = [data.image_ids[index] for index in chosen], len(chosen)
    objects = sum(1 for index in chosen for _ in data.objects(index))
    if not rows:
        return Precision(0.0, 0.0, 0.0, (0.0,) * RESAMPLINGS, count, objects)
    with quiet():
        found = data.index.loadRes(rows)
        evaluation = pycocotools("cocoeval").COCOeval(data.index, found, kind)
        options = evaluation.params
        options.imgIds, options.areaRng, options.areaRngLbl, options.maxDets = images, _ALL, ["all"], [MOST]
        evaluation.evaluate()
        whole = _accumulated(evaluation, list(range(count)))
        random = np.random.default_rng(_SEED)
        drawn = [random.integers(0, count, count).tolist() for _ in range(RESAMPLINGS)]
        resampled = tuple(_mean(_accumulated(evaluation, images)) for images in drawn)
    return Precision(_mean(whole), _mean(whole[:1]), _mean(whole[5:6]), resampled, count, objects)


def _accumulated(evaluation: Any, chosen: list[int]) -> np.ndarray[Any, Any]:
    """Precision by threshold, recall and category of some of the images, perhaps some of them several times."""
    by_image, images = evaluation.evalImgs, evaluation.params.imgIds
    kinds = len(by_image) // len(images)
    # pycocotools orders by category, then by image.
    evaluation.evalImgs = [
        by_image[kind * len(images) + index] for kind, index in itertools.product(range(kinds), chosen)
    ]
    evaluation._paramsEval.imgIds = list(range(len(chosen)))
    evaluation.params.imgIds = evaluation._paramsEval.imgIds
    evaluation.accumulate()
    evaluation.evalImgs, evaluation.params.imgIds = by_image, images
    evaluation._paramsEval.imgIds = images
    precision: np.ndarray[Any, Any] = evaluation.eval["precision"][:, :, :, 0, -1]
    return precision


def _mean(precision: np.ndarray[Any, Any]) -> float:
    """The mean of what is defined, in points; categories without objects have no precision."""
    defined = precision[precision > -1]
    return 100 * float(defined.mean()) if defined.size else 0.0
