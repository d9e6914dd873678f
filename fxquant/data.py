"""Images and models from disk: class folders or .npz in, preprocessed batches out; local weights into timm models.

    model = load_model("vit_tiny_patch16_224", weights="tiny.safetensors", num_classes=200)
    calibration = load_images("train", 32, model.preprocessing)
    for images_bchw, labels in ImageData.open("val", model.preprocessing).batches(64): ...

An image folder is opened image by image, so memory holds one batch; an .npz is held as it is stored. EXIF rotation is
ignored, as in the published protocols. Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from fxquant import embedded
from fxquant.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
Batch = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input: resize the short side to size / crop_pct, centre crop, normalize.

    input_size: (channels, height, width). mean, std: per channel, of pixels in 0..1. interpolation: as timm names it.
    """

    input_size: tuple[int, int, int]
    crop_pct: float = 1.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        """Raise DataError for values that make no preprocessing."""
        if len(self.input_size) != 3 or self.input_size[0] not in (1, 3) or min(self.input_size) < 1:
            raise DataError(f"input_size must be (1 or 3 channels, height, width), found {self.input_size}")
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise DataError(f"interpolation must be nearest, bilinear or bicubic, found {self.interpolation!r}")
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct must be above 0 and at most 1, found {self.crop_pct}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.input_size[0]:
                raise DataError(f"{name} needs {self.input_size[0]} numbers, one a channel, found {list(values)}")
        if min(self.std) <= 0:
            raise DataError(f"std must be positive, found {list(self.std)}")

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """What timm says the model was trained with."""
        config = timm.data.resolve_model_data_config(model)
        channels = int(config["input_size"][0])
        return cls(
            input_size=tuple(config["input_size"]),
            crop_pct=float(config["crop_pct"]),
            mean=tuple(config["mean"])[:channels],
            std=tuple(config["std"])[:channels],
            interpolation=config["interpolation"] if config["interpolation"] != "random" else "bilinear",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Inverse of `to_dict`; raises DataError for anything else."""
        try:
            given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**given)
        except (TypeError, AttributeError) as error:
            raise DataError(f"not a preprocessing: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def with_options(self, **options: Any) -> Preprocessing:
        """With the options that are not None replaced; `image_size` sets height and width."""
        given = {key: value for key, value in options.items() if value is not None}
        if (size := given.pop("image_size", None)) is not None:
            given["input_size"] = (self.input_size[0], size, size)
        return replace(self, **given)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """From a picture to a float32 tensor (C, H, W), as timm evaluates."""
        found: Callable[[Image.Image], Tensor] = timm.data.create_transform(**asdict(self), is_training=False)
        mode = "L" if self.input_size[0] == 1 else "RGB"
        return lambda picture: found(picture.convert(mode))


EMBEDDED = Preprocessing((1, 28, 28), mean=(embedded.MEAN,), std=(embedded.STD,))


@dataclass(frozen=True)
class ImageData:
    """Images that are read when asked for.

    count: how many. read: the preprocessed image (C, H, W) of an index. labels: int64 (count,), None without.
    classes: how many label values there may be, None where unknown.
    """

    name: str
    count: int
    read: Callable[[int], Tensor]
    labels: Tensor | None = None
    classes: int | None = None

    @classmethod
    def open(cls, path: str | PathLike[str], preprocessing: Preprocessing) -> ImageData:
        """Class folders (sorted names are labels 0, 1, ...), a flat folder of images (no labels), or an .npz.

        An .npz has `images`: uint8 (N, H, W, C) or (N, H, W), preprocessed here; or float (N, C, H, W), taken as
        preprocessed already; and optionally `labels`, integers (N,). Raises DataError.
        """
        place = Path(path)
        if place.is_dir():
            try:
                return _open_folder(place, preprocessing)
            except OSError as error:
                raise DataError(f"{place} cannot be listed: {error}") from error
        if not place.exists():
            raise DataError(f"{place} does not exist: give a folder of images or an .npz file")
        if place.suffix.lower() != ".npz":
            raise DataError(f"{place} is neither a folder nor an .npz file")
        return _open_npz(place, preprocessing)

    def batches(self, batch_size: int = 64, limit: int | None = None) -> Iterator[Batch]:
        """Images (B, C, H, W) with labels; `limit` takes that many, evenly spread over all."""
        chosen = list(range(self.count)) if limit is None else _spread(self.count, limit)
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            labels = None if self.labels is None else self.labels[torch.tensor(part)]
            yield torch.stack([self.read(index) for index in part]), labels

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` images (count, C, H, W) drawn without replacement. Raises DataError when there are fewer."""
        if count < 1 or count > self.count:
            raise DataError(f"{self.name} has {self.count} images, and {count} are asked for: --images, or count")
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        return torch.stack([self.read(index) for index in order[:count].tolist()])

    def check_labels(self, classes: int | None = None) -> None:
        """Raise DataError unless there are labels, all below `classes`."""
        if self.labels is None:
            raise DataError(
                f"{self.name} has no labels, and accuracy needs them: give class sub-folders, or an .npz with `labels`"
            )
        highest = int(self.labels.max())
        if classes is not None and highest >= classes:
            raise DataError(f"{self.name} has label {highest}, but the model gives {classes} classes")


def load_images(
    path: str | PathLike[str], count: int, preprocessing: Preprocessing = EMBEDDED, seed: int = 0
) -> Tensor:
    """`count` images for calibration, float32 (count, C, H, W), drawn by seed from a folder or .npz; no labels needed.

    Raises DataError.
    """
    return ImageData.open(path, preprocessing).sample(count, seed)


def embedded_test() -> ImageData:
    """The 2,000 test images that come with the package."""
    images, labels = embedded.test_images()
    return ImageData("the embedded test images", len(images), lambda index: images[index], labels, 10)


def _spread(count: int, limit: int) -> list[int]:
    if limit < 1:
        raise DataError(f"the limit must be at least 1 image, found {limit}")
    wanted = min(count, limit)
    return [position * count // wanted for position in range(wanted)]


def _open_folder(place: Path, preprocessing: Preprocessing) -> ImageData:
    folders = sorted(folder for folder in place.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    by_class = [_images_in(folder, deep=True) for folder in folders]
    flat = _images_in(place, deep=False)
    if any(by_class) and flat:
        raise DataError(f"{place} has images beside class folders: move them into folders, or the folders away")
    files = flat or [file for found in by_class for file in found]
    if not files:
        raise DataError(f"{place} has no images (looked for {', '.join(sorted(SUFFIXES))})")
    if empty := [folder.name for folder, found in zip(folders, by_class, strict=True) if not found and not flat]:
        raise DataError(f"{place}: no images in class folder {empty[0]!r}, which would still take a label; remove it")
    labels = None if flat else torch.tensor([label for label, found in enumerate(by_class) for _ in found])
    transform = preprocessing.transform()
    classes = None if flat else len(folders)
    return ImageData(str(place), len(files), lambda index: _read_image(files[index], transform), labels, classes)


def _images_in(folder: Path, deep: bool) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(file for file in found if file.suffix.lower() in SUFFIXES and file.is_file())


def _read_image(file: Path, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    try:
        with Image.open(file) as picture:
            return transform(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error


def _open_npz(place: Path, preprocessing: Preprocessing) -> ImageData:
    try:
        with np.load(place, allow_pickle=False) as archive:
            if "images" not in archive:
                raise DataError(f"{place} has no array called 'images', only {', '.join(archive) or 'nothing'}")
            images = archive["images"]
            labels = archive.get("labels")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place} cannot be read as an .npz of plain arrays: {error}") from error
    read = _reader(place, images, preprocessing)
    if not len(images):
        raise DataError(f"{place} has no images: 'images' has shape {images.shape}")
    return ImageData(str(place), len(images), read, None if labels is None else _labels(place, labels, len(images)))


def _reader(place: Path, images: np.ndarray, preprocessing: Preprocessing) -> Callable[[int], Tensor]:
    shape, channels = images.shape, preprocessing.input_size[0]
    if images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and shape[3] in (1, 3))):
        transform = preprocessing.transform()
        pictures = images[..., 0] if images.ndim == 4 and shape[3] == 1 else images
        return lambda index: transform(Image.fromarray(pictures[index]))
    if images.dtype.kind == "f" and images.ndim == 4:
        if tuple(shape[1:]) != preprocessing.input_size:
            expected = ", ".join(map(str, preprocessing.input_size))
            raise DataError(
                f"{place}: float images are taken as preprocessed, and must be (N, {expected}); found {shape}"
            )
        return lambda index: torch.from_numpy(np.ascontiguousarray(images[index], dtype=np.float32))
    raise DataError(
        f"{place}: 'images' must be uint8 (N, H, W) or (N, H, W, 1 or 3), or preprocessed float (N, {channels}, H, W); "
        f"found {images.dtype} {shape}"
    )


def _labels(place: Path, labels: np.ndarray, count: int) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (count,) or int(labels.min()) < 0:
        raise DataError(
            f"{place}: 'labels' must be {count} integers from 0, one an image; found {labels.dtype} {labels.shape}"
        )
    return torch.from_numpy(labels.astype(np.int64))
