"""Pictures and .npz arrays from files that anybody may have written: read within bounds, or refused by name.

An .npz is read entry by entry: what its header claims is held against the size of the entry before anything is
allocated, and nothing is unpickled. How large a picture may become is for the transform to say.
"""

from __future__ import annotations

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fxquant.checks.finite import is_finite
from fxquant.errors import DataError

_PART_BYTES = 2**24
_RATIO, _SMALL_BYTES = 64, 2**28  # pictures shrink by less when they are compressed; small files may by more
_DAMAGE = (
    OSError, ValueError, EOFError, SyntaxError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    MemoryError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError,
)  # fmt: skip
"""What zipfile, numpy and PIL raise for damaged files."""


def read_picture(file: Path, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """A picture, transformed: float32 (C, H, W).

    file: the picture. transform: from a picture to a tensor; may raise DataError.

    Raises DataError for what cannot be read, has no pixels, or is refused by the transform.
    """
    try:
        with Image.open(file) as picture:
            width, height = picture.size
            if not width or not height:
                raise DataError(f"it has no pixels, its size is {width} x {height}")
            return transform(picture)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error or type(error).__name__}") from error


def read_arrays(file: Path, names: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    """The arrays of an .npz that have these names; those that it does not have are left out.

    Raises DataError for a file that is damaged, encrypted, holds objects or claims more than it has.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            if names[0] not in entries:
                listed = ", ".join(list(entries)[:5]) or "nothing"
                raise DataError(f"{file} has no array called {names[0]!r}, only {listed}")
            limit = max(_SMALL_BYTES, _RATIO * file.stat().st_size)
            return {name: _read_entry(archive, entries[name], limit) for name in names if name in entries}
    except DataError:
        raise
    except _DAMAGE as error:
        reason = error or type(error).__name__
        raise DataError(f"{file} cannot be read as an .npz of plain arrays: {reason}") from error


def image_reader(
    place: Path,
    images: np.ndarray,
    input_size: tuple[int, int, int],
    transform: Callable[[Image.Image], Tensor],
) -> Callable[[int], Tensor]:
    """What reads one of the images of an array, float32 (C, H, W): bytes as pictures, floats as they are.

    Args:
        place: where the array comes from, for messages.
        images: uint8 (N, H, W) or (N, H, W, C), or float (N, C, H, W).
        input_size: (channels, height, width) that the model takes.
        transform: makes a picture the model's input.

    Raises DataError for other arrays; what it returns, for values that are not finite and for what transform refuses.
    """
    shape = images.shape
    is_bytes = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and shape[3] in (1, 3)))
    if not is_bytes and not (images.dtype.kind == "f" and images.ndim == 4):
        raise DataError(
            f"{place}: 'images' must be uint8 (N, H, W) or (N, H, W, 1 or 3), or preprocessed float "
            f"(N, {input_size[0]}, H, W); found {images.dtype} {shape}"
        )
    if not images.size:
        raise DataError(f"{place} has no images: 'images' has shape {shape}")
    if is_bytes:
        pictures = images[..., 0] if images.ndim == 4 and shape[3] == 1 else images

        def made(index: int) -> Tensor:
            try:
                return transform(Image.fromarray(pictures[index]))
            except DataError as error:
                raise DataError(f"{place}, image {index}: {error}") from error

        return made
    if tuple(shape[1:]) != input_size:
        expected = ", ".join(map(str, input_size))
        raise DataError(f"{place}: float images are taken as preprocessed, and must be (N, {expected}); found {shape}")

    def read(index: int) -> Tensor:
        with np.errstate(over="ignore"):
            image_chw = torch.from_numpy(images[index].astype(np.float32))
        if not is_finite(image_chw):
            raise DataError(f"{place}: image {index} has values that are not finite numbers in float32")
        return image_chw

    return read


def labels_of(place: Path, labels: np.ndarray, count: int) -> Tensor:
    """Labels, int64 (count,).

    Args:
        place: the file, for the message.
        labels: the array of labels that the file has.
        count: how many images it has.

    Raises DataError for others than integers from 0, one an image.
    """
    is_fitting = labels.dtype.kind in "iu" and labels.shape == (count,)
    if not is_fitting or not 0 <= int(labels.min()) <= int(labels.max()) < 2**31:
        raise DataError(
            f"{place}: 'labels' must be {count} integers from 0, one an image; found {labels.dtype} {labels.shape}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> np.ndarray:
    """One array. Raises ValueError where it cannot be what the header says."""
    if entry.file_size > limit:
        raise ValueError(
            f"{entry.filename} would have {entry.file_size:,} bytes, more than the {limit:,} that such a file may give"
        )
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"{entry.filename} has format version {version}, and 1.0 and 2.0 are read")
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds Python objects, which are never unpickled")
        count = math.prod(shape)
        if min(shape, default=1) < 0 or count * dtype.itemsize != entry.file_size - stream.tell():
            raise ValueError(f"{entry.filename} says {dtype} {shape}, which is not what its bytes hold")
        content = bytearray(count * dtype.itemsize)
        position = 0
        while position < len(content) and (part := stream.read(min(_PART_BYTES, len(content) - position))):
            content[position : position + len(part)] = part
            position += len(part)
        if position < len(content):
            raise ValueError(f"{entry.filename} ends after {position:,} of {len(content):,} bytes")
    array = np.frombuffer(content, dtype=dtype, count=count) if count else np.zeros(0, dtype)
    return array.reshape(shape[::-1]).transpose() if is_fortran else array.reshape(shape)
