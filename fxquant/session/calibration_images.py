"""Calibration images from what a caller has: a tensor, a list of tensors, a DataLoader.

An iterable is gone through once, and what it gives is held as one tensor: at most `MOST_IMAGES` images and
`MOST_BYTES`, since a loader over a whole data set would fill any memory, and 32 images are usual. One that gives more
is refused when it does. Its items are images (C, H, W), batches (B, C, H, W), lists of images, tuples or lists that
begin with one of these, as (images, labels) of a DataLoader, or dicts that have them under a usual key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import CalibrationError

MOST_IMAGES, MOST_BYTES = 1024, 2**30
_END = object()
_KEYS = ("pixel_values", "images", "image", "x")


def gathered(given: Any) -> Tensor:
    """One tensor (N, C, H, W), without gradients, of a tensor, which is not copied, or of an iterable; see the module.

    Raises CalibrationError, naming the item, for what are no images of one shape and dtype, and for too many.
    """
    if isinstance(given, Tensor):
        return given.detach()
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping) or hasattr(given, "__array__"):
        raise CalibrationError.for_type(
            f"calibration images are a tensor (N, C, H, W), or a list or DataLoader of such, not a "
            f"{type(given).__name__}: torch.from_numpy or torch.stack make a tensor"
        )
    batches: list[Tensor] = []
    images = size = 0
    iterator = iter(given)
    while (item := _next(iterator, len(batches))) is not _END:
        batch = _batch(item, len(batches))
        if batches and (batch.shape[1:] != batches[0].shape[1:] or batch.dtype != batches[0].dtype):
            raise CalibrationError(
                f"calibration item {len(batches)} has images of shape {tuple(batch.shape[1:])} and {batch.dtype}, the "
                f"first has {tuple(batches[0].shape[1:])} and {batches[0].dtype}: resize them alike"
            )
        images, size = images + len(batch), size + batch.nbytes
        if images > MOST_IMAGES or size > MOST_BYTES:
            enough = max(1, (len(batches) + 1) * 32 // images)
            raise CalibrationError(
                f"the calibration iterable gives over {MOST_IMAGES} images or {MOST_BYTES >> 30} GiB, and 32 images "
                f"are usual: limit it, for example itertools.islice(loader, {enough})"
            )
        batches.append(batch)
    if not batches:
        raise CalibrationError("the calibration iterable gives nothing: a generator can be gone through only once")
    return torch.cat(batches).detach()


def _next(iterator: Any, place: int) -> Any:
    """The next item; `_END` where there is no other."""
    try:
        return next(iterator)
    except StopIteration:
        return _END
    except Exception as error:  # whatever a data set of the caller's raises
        raise CalibrationError(f"calibration item {place} cannot be read: {type(error).__name__}: {error}") from error


def _batch(item: Any, place: int) -> Tensor:
    """The images (B, C, H, W) in one item."""
    found = item
    if isinstance(found, Mapping):
        found = next((found[key] for key in _KEYS if key in found), None)
    elif isinstance(found, list) and len(found) > 1 and _are_images(found):
        found = torch.stack(found)
    elif isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim not in (3, 4):
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise CalibrationError.for_type(
            f"calibration item {place} is {what}, not an image (C, H, W), a batch (B, C, H, W), a pair (images, "
            f"labels) or a dict with {', '.join(map(repr, _KEYS))}"
        )
    return found if found.ndim == 4 else found[None]


def _are_images(items: list[Any]) -> bool:
    """Whether all of these are images (C, H, W) of one shape and dtype, as loaders that put nothing together give."""
    kinds = {(item.shape, item.dtype) if isinstance(item, Tensor) and item.ndim == 3 else None for item in items}
    return len(kinds) == 1 and None not in kinds
