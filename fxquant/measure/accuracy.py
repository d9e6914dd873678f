"""Top-1 accuracy over batches of labelled images, with its standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fxquant import ranks
from fxquant.artefact.cache import signature
from fxquant.checks.arguments import whole
from fxquant.checks.hints import checked
from fxquant.data.images import ImageData
from fxquant.errors import DataError, FxQuantError, ModelError, OptionError, TraceError
from fxquant.graph.nodes import device_of
from fxquant.graph.output_tree import flatten
from fxquant.report.progress import shown
from passes.pipeline.progress import ProgressReporter

_VALUES_AT_ONCE = 2**22  # of images: 27 of 224 x 224 pixels


@dataclass(frozen=True)
class Accuracy:
    """How many of `count` images were classified correctly.

    Args:
        correct: how many images were given their own class.
        count: how many images there were.
        labels: how they were matched to the model's classes.
        right: of every image in order, whether it was; () where that was not kept.
    """

    correct: int
    count: int
    labels: str = "as given"
    right: tuple[bool, ...] = field(default=(), repr=False)

    @property
    def top1(self) -> float:
        """Percent correct."""
        return 100 * self.correct / self.count

    @property
    def standard_error(self) -> float:
        """Standard error of `top1` over the choice of images, in points: 100 sqrt(p (1 - p) / n)."""
        share = self.correct / self.count
        return 100 * math.sqrt(share * (1 - share) / self.count)

    def __str__(self) -> str:
        """`91.55 % +/- 0.62 (1,831 of 2,000)`."""
        return f"{self.top1:.2f} % +/- {self.standard_error:.2f} ({self.correct:,} of {self.count:,})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "top1": self.top1,
            "standard_error": self.standard_error,
            "correct": self.correct,
            "count": self.count,
            "labels": self.labels,
        }


def error_of_drop(before: Sequence[bool], after: Sequence[Sequence[bool]]) -> float:
    """Standard error of a drop in top-1 over the choice of images, in points.

    Both models saw the same images, so what counts is how an image's answer changed. Where both are right or both wrong
    about nearly all of them, this is far below the standard error of either accuracy.

    Args:
        before: of every image, whether the float model was right.
        after: the same of quantized models, one or more, whose mean drop is meant; images in the same order.
    """
    lost = [was - statistics.fmean(now) for was, *now in zip(before, *after, strict=True)]
    return 100 * math.sqrt(statistics.pvariance(lost) / len(lost))


@checked(DataError, model=ModelError, progress=OptionError)
@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: ImageData,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    progress: ProgressReporter | bool | None = None,
    label: str = "evaluating",
) -> Accuracy:
    """Top-1 of a model in eval mode; memory holds one batch.

    Class folders are matched to the model's classes by `ImageData.for_outputs`. Raises DataError without labels, for
    labels beyond the model's classes and class names that say nothing of them, ModelError for a model that cannot run
    on these images or is another one in training mode, and for outputs that are not class scores (B, classes) or NaN.
    Ranks of a process group share the batches out.

    Args:
        model: the model to measure, in inference mode, on any device; images go there batch by batch.
        data: images with labels.
        batch_size: how many images go through the model at a time; None: 64, and on a CPU fewer where they are large.
        limit: how many images at most; None: all.
        progress: where it reports how far it is, as in `fxquant.compile`.
        label: how the progress display calls this step.
    """
    if batch_size is not None:
        whole("batch_size", batch_size, DataError, least=1, most=2**31 - 1)
    _check_mode(model)
    device = device_of(model)
    given = {"batch size": batch_size, "limit": limit, "images": (data.name, data.count)}
    with ranks.together(lambda: {**given, "model": signature(model)}), shown(progress) as reporter:
        first = data.read(0)
        data = data.for_outputs(_scores(_first(model, first.to(device))).shape[1])
        labels, parts = data.checked_labels(), data.parts(batch_size or _images_at_once(first, device), limit)
        task = reporter.track(label, len(parts))

        def right(part: list[int]) -> list[bool]:
            images = torch.stack([data.read(index) for index in part])
            scores = _scores(model(images.to(device)))
            is_nan = torch.isnan(scores).any(1).cpu()
            if bool(is_nan.any()):
                index = part[int(is_nan.nonzero()[0])]
                raise ModelError(
                    f"the model gives NaN as scores of image {index} of {data.name}: look at it and at the weights"
                )
            return torch.eq(scores.argmax(1).cpu(), labels[torch.tensor(part)]).tolist()

        found = tuple(chain.from_iterable(ranks.dealt(label, right, parts, advance=task.advance)))
        task.close()
    return Accuracy(sum(found), len(found), data.matched_by, found)


def _images_at_once(image_chw: torch.Tensor, device: torch.device) -> int:
    """As many as an accelerator likes; on a CPU as many as keep a layer's output within memory that is used again.

    The C library gives tensors above 32 MB back to the system at once, and fetches the next ones page by page: 32 ms an
    image of a DeiT-T in batches of 64, 28 ms in batches of 27 (`benchmarks/evaluation_speed.py`).
    """
    return 64 if device.type != "cpu" else min(64, max(1, _VALUES_AT_ONCE // image_chw.numel()))


def _check_mode(model: nn.Module) -> None:
    """Raise ModelError where a module drops values at random, or normalizes by the batch and learns from it."""
    for name, module in model.named_modules():
        fields = ("p",) if isinstance(module, _DropoutNd) else ("drop_prob", "dropout")
        drops = any(isinstance(chance := getattr(module, field, 0), int | float) and chance > 0 for field in fields)
        if module.training and (drops or isinstance(module, _BatchNorm)):
            raise ModelError(f"{name or 'the model'} is in training mode, where it gives something else: model.eval()")


def _first(model: nn.Module, image_chw: torch.Tensor) -> Any:
    """What the model returns for one image. Raises ModelError where it cannot run."""
    try:
        return model(image_chw[None])
    except FxQuantError:
        raise
    except Exception as error:  # whatever a model of the caller's raises
        raise ModelError(f"the model cannot run on an image of shape {tuple(image_chw.shape)}: {error}") from error


def _scores(output: Any) -> torch.Tensor:
    """The first tensor of what a model returns."""
    try:
        scores: torch.Tensor | None = next(iter(flatten(output)[1]), None)
    except TraceError:
        scores = None
    if scores is None or scores.ndim != 2:
        raise ModelError(
            "accuracy needs class scores (B, classes), and the model's output is something else: evaluate a "
            "model that has a head"
        )
    return scores
