"""Images and models from disk: class folders or .npz in, preprocessed batches out; local weights into timm models.

    model = load_model("vit_tiny_patch16_224", weights="tiny.safetensors", num_classes=200)
    calibration = load_images("train", 32, model.preprocessing)
    for images_bchw, labels in ImageData.open("val", model.preprocessing).batches(64): ...

An image folder is opened image by image, so memory holds one batch; an .npz is held as it is stored. EXIF rotation is
ignored, as in the published protocols. Nothing is downloaded and nothing is unpickled. Names of classes become a
model's classes where the model is known, in `ImageData.for_outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from fxquant.checks.arguments import whole
from fxquant.checks.hints import checked
from fxquant.data import embedded
from fxquant.data.class_names import as_numbers, check_classes, indices_of, matched, read_classes
from fxquant.data.image_files import image_reader, labels_of, read_arrays, read_picture
from fxquant.data.image_folders import images_by_folder, listed_images
from fxquant.data.preprocessing import EMBEDDED, Preprocessing
from fxquant.errors import DataError

LISTED = "by the names of classes given"
Batch = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class ImageData:
    """Images that are read when asked for.

    Args:
        name: what error messages and reports call it.
        count: how many images there are.
        read: the preprocessed image (C, H, W) of an index.
        labels: int64 (count,); None without. Of data with `names` they count these, else the model's classes.
        classes: how many label values there may be; None where unknown.
        names: of the classes, sorted, where no list said which of the model's they are; `for_outputs` finds that out.
        matched_by: how labels came to be the model's classes, in words.
    """

    name: str
    count: int
    read: Callable[[int], Tensor]
    labels: Tensor | None = None
    classes: int | None = None
    names: tuple[str, ...] = ()
    matched_by: str = "as given"

    @classmethod
    @checked(DataError)
    def open(
        cls,
        path: str | PathLike[str],
        preprocessing: Preprocessing,
        *,
        classes: str | PathLike[str] | Sequence[str] | None = None,
        labels: str | PathLike[str] | None = None,
    ) -> ImageData:
        """Class folders, a folder of images with a file of labels or without labels, or an .npz.

        Args:
            path: a folder, or an .npz with `images`: uint8 (N, H, W, C) or (N, H, W), preprocessed here; or float
                (N, C, H, W), taken as preprocessed already; and optionally `labels`, integers (N,).
            preprocessing: what makes a model's input of a picture.
            classes: names of the model's classes in the order of its outputs, or a file of them (`read_classes`).
                Without, folders are matched to the model's classes when it is known (`for_outputs`).
            labels: a file that gives the class of every image, by number or name, with paths below the folder
                (`read_labels`).

        Raises DataError.
        """
        place = Path(path)
        known = _names(classes)
        try:
            if not place.exists():
                raise DataError(f"{place} does not exist: give a folder of images or an .npz file")
            if place.is_dir():
                found = images_by_folder(place) if labels is None else listed_images(place, labels)
                return _labelled(place, *found, preprocessing, known, listed=labels is not None)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{place} cannot be listed: {error}") from error
        if place.suffix.lower() != ".npz":
            raise DataError(f"{place} is neither a folder nor an .npz file")
        if labels is not None or known is not None:
            raise DataError(f"{place} has its labels in it: classes and labels are for folders of images")
        return _open_npz(place, preprocessing)

    def batches(self, batch_size: int = 64, limit: int | None = None) -> Iterator[Batch]:
        """Images (B, C, H, W) with labels; `limit` takes that many, evenly spread over all."""
        for part in self.parts(batch_size, limit):
            labels = None if self.labels is None else self.labels[torch.tensor(part)]
            yield torch.stack([self.read(index) for index in part]), labels

    def parts(self, batch_size: int, limit: int | None = None) -> list[list[int]]:
        """Indices of the images of each batch; `limit` takes that many, evenly spread over all."""
        size = whole("batch_size", batch_size, DataError, least=1)
        chosen = spread(self.count, limit)
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def sample(self, count: int, seed: int = 0, advance: Callable[[int], None] | None = None) -> Tensor:
        """`count` images (count, C, H, W) drawn without replacement. Raises DataError when there are fewer.

        Args:
            count: how many images.
            seed: what they are drawn by.
            advance: called with 1 after every image.
        """
        if not 1 <= whole("count", count, DataError) <= self.count:
            raise DataError(
                f"{self.name} has {self.count} images, and {count} are asked for: ask for fewer, by --images or count"
            )
        draw = torch.Generator().manual_seed(whole("seed", seed, DataError, least=0, most=2**32 - 1))
        order = torch.randperm(self.count, generator=draw)
        found = []
        for index in order[:count].tolist():
            found.append(self.read(index))
            if advance is not None:
                advance(1)
        return torch.stack(found)

    def checked_labels(self, classes: int | None = None) -> Tensor:
        """The labels, int64 (count,). Raises DataError unless there are some, all below `classes`."""
        if self.labels is None:
            raise DataError(
                f"{self.name} has no labels, and accuracy needs them: give class sub-folders, a file of labels "
                f"(--labels FILE, or labels=), or an .npz with `labels`"
            )
        highest = int(self.labels.max())
        if classes is not None and highest >= classes:
            raise DataError(f"{self.name} has label {highest}, but the model gives {classes} classes")
        return self.labels

    def for_outputs(self, outputs: int) -> ImageData:
        """The same images with labels as a model of so many outputs numbers its classes; see `class_names.matched`.

        Raises DataError where there are no labels, where names say nothing of the model's classes, and for labels
        beyond them.
        """
        labels = self.checked_labels()
        if self.names:
            indices, how = matched(self.names, outputs, self.name)
            return replace(self, labels=torch.tensor(indices)[labels], classes=outputs, names=(), matched_by=how)
        if self.matched_by == LISTED and self.classes != outputs:
            raise DataError(f"{self.classes} names of classes are given, but the model gives {outputs} classes")
        self.checked_labels(outputs)
        return self


@checked(DataError)
def load_images(
    path: str | PathLike[str],
    count: int,
    preprocessing: Preprocessing = EMBEDDED,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """`count` images for calibration, float32 (count, C, H, W), drawn by seed from a folder or .npz; no labels needed.

    Args:
        path: a folder of pictures, or an .npz file.
        count: how many images.
        preprocessing: how a picture becomes the model's input.
        seed: what the images are drawn by.
        advance: called with 1 after every image.

    Raises DataError.
    """
    return ImageData.open(path, preprocessing).sample(count, seed, advance)


def embedded_test() -> ImageData:
    """The 2,000 test images that come with the package."""
    images, labels = embedded.test_images()
    return ImageData("the embedded test images", len(images), lambda index: images[index], labels, 10)


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of so many of `count` images, evenly spread over them; None: of all. Raises DataError for no image."""
    if limit is None:
        return list(range(count))
    if whole("limit", limit, DataError) < 1:
        raise DataError(f"the limit must be at least 1 image, found {limit}")
    wanted = min(count, limit)
    return [position * count // wanted for position in range(wanted)]


def _names(classes: str | PathLike[str] | Sequence[str] | None) -> list[str] | None:
    """The model's classes, by whichever means they are given."""
    if classes is None:
        return None
    is_file = isinstance(classes, str | PathLike)
    return read_classes(classes) if is_file else check_classes(classes, "the list of classes")  # type: ignore[arg-type]


def _labelled(
    place: Path,
    files: list[Path],
    found: list[str] | None,
    preprocessing: Preprocessing,
    classes: list[str] | None,
    *,
    listed: bool,
) -> ImageData:
    """Files with the names of their classes as data: by the list of classes where there is one.

    listed: names are from a file of labels, where numbers are the model's classes unless the list has them as names.
    """
    transform = preprocessing.transform()

    def read(index: int) -> Tensor:
        return read_picture(files[index], transform)

    if found is None:
        return ImageData(str(place), len(files), read)
    names = sorted(set(found))
    position = {name: index for index, name in enumerate(names)}
    labels = torch.tensor([position[name] for name in found])
    numbers = as_numbers(names) if listed and not set(names) <= set(classes or ()) else None
    if classes is None and numbers is None:
        return ImageData(str(place), len(files), read, labels, len(names), tuple(names))
    indices = indices_of(names, classes or [], str(place)) if numbers is None else numbers
    data = ImageData(str(place), len(files), read, torch.tensor(indices)[labels])
    if classes is None:
        return data
    data.checked_labels(len(classes))
    return replace(data, classes=len(classes), matched_by=LISTED)


def _open_npz(place: Path, preprocessing: Preprocessing) -> ImageData:
    arrays = read_arrays(place, ("images", "labels"))
    read = image_reader(place, arrays["images"], preprocessing.input_size, preprocessing.transform())
    count = len(arrays["images"])
    return ImageData(str(place), count, read, labels_of(place, arrays["labels"], count) if "labels" in arrays else None)
