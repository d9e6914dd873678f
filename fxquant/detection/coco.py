"""Images with objects in COCO's format: a JSON file of images, annotations and categories, and a folder of pictures.

A detector's labels are 1, 2, ... in the order of the categories' ids; 0 is nothing. Boxes are (x1, y1, x2, y2) in
pixels where a detector sees them, (x, y, width, height) in the file.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fxquant.checks.hints import checked
from fxquant.data.image_files import read_picture
from fxquant.errors import DataError, MissingExtraError


@dataclass(frozen=True)
class CocoImages:
    """Images with objects.

    Args:
        document: "images", "annotations" and "categories", as in a COCO file; see `of`.
        folder: where the pictures lie that it names.
        name: what reports call the set.
    """

    document: dict[str, Any]
    folder: Path
    name: str

    @classmethod
    @checked(DataError)
    def open(cls, annotations: str | PathLike[str], folder: str | PathLike[str]) -> CocoImages:
        """The images of a COCO file. Raises DataError where it is none, or its folder is not there.

        annotations: the JSON file. folder: of the pictures.
        """
        try:
            document = json.loads(Path(annotations).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{annotations} cannot be read as JSON: {error}") from error
        return cls.of(document, folder, Path(annotations).name)

    @classmethod
    def of(cls, document: dict[str, Any], folder: str | PathLike[str], name: str) -> CocoImages:
        """The images of a document that has been read; its annotations are numbered anew, from 1.

        Args:
            document: as in a COCO file.
            folder: of the pictures.
            name: what reports call the set.

        Raises DataError for a document of another form, a folder that is not there, an image without a picture, and a
        set without images.
        """
        try:
            places = [Path(folder) / str(image["file_name"]) for image in document["images"]]
            known = {key: {entry["id"] for entry in document[key]} for key in ("images", "categories")}
            annotations = _numbered(document["annotations"], known["images"])
            strange = {annotation["category_id"] for annotation in annotations} - known["categories"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{name} is no COCO file of images, annotations and categories: {error!r}") from error
        if strange or any(len(known[key]) < len(document[key]) for key in known):
            what = f"annotations of category {min(strange)}, which it does not list" if strange else "one id twice"
            raise DataError(f"{name} has {what}: correct the file")
        missing = next((place for place in places if not place.is_file()), None)
        if missing is not None:
            raise DataError(f"there is no picture {missing}: give the folder that the names in {name} belong to")
        if not places or not document["categories"]:
            raise DataError(f"{name} has {len(places)} images and {len(document['categories'])} categories")
        kept = {"images": document["images"], "annotations": annotations}
        return cls({**kept, "categories": document["categories"]}, Path(folder), name)

    def __len__(self) -> int:
        return len(self.document["images"])

    @cached_property
    def category_ids(self) -> list[int]:
        """The file's id of label 1, 2, ..."""
        return sorted(category["id"] for category in self.document["categories"])

    @property
    def image_ids(self) -> list[int]:
        """The file's ids of the images, in order."""
        return [image["id"] for image in self.document["images"]]

    def image(self, index: int) -> Tensor:
        """One picture, float32 (3, H, W) from 0 to 1, as torchvision's detectors take it.

        Raises DataError where it cannot be read, or is of another size than the file says.
        """
        entry = self.document["images"][index]
        place = self.folder / str(entry["file_name"])
        found = read_picture(place, _to_tensor)
        height, width = found.shape[1:]
        if (entry.get("height", height), entry.get("width", width)) != (height, width):
            raise DataError(
                f"{place} is {height} x {width}, and {self.name} says {entry.get('height')} x {entry.get('width')}: "
                "its objects are elsewhere in this picture; give the pictures that the file was made for"
            )
        return found

    def images(self, count: int | None = None) -> list[Tensor]:
        """The first pictures; None: all of them."""
        return [self.image(index) for index in range(len(self) if count is None else min(count, len(self)))]

    @cached_property
    def index(self) -> Any:
        """pycocotools' view of the document. Raises MissingExtraError without it."""
        coco = pycocotools("coco").COCO()
        coco.dataset = self.document
        with quiet():
            coco.createIndex()
        return coco

    def objects(self, index: int) -> Iterator[dict[str, Any]]:
        """The annotations of one image, but those of crowds."""
        found = self.index.imgToAnns[self.image_ids[index]]
        yield from (annotation for annotation in found if not annotation.get("iscrowd"))

    def target(self, index: int, masks: bool = False) -> dict[str, Tensor]:
        """What a detector is trained towards: boxes (N, 4) float, labels (N,) int64, masks (N, H, W) uint8.

        index: of the image. masks: whether masks are wanted too.
        """
        objects = list(self.objects(index))
        boxes = torch.tensor([found["bbox"] for found in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self.category_ids.index(found["category_id"]) + 1 for found in objects]).long()
        target = {"boxes": boxes, "labels": labels}
        if masks:
            found = [torch.from_numpy(self.index.annToMask(found)) for found in objects]
            none = torch.zeros(0, *self.image(index).shape[1:], dtype=torch.uint8) if not found else None
            target["masks"] = torch.stack(found) if none is None else none
        return target

    @cached_property
    def has_shapes(self) -> bool:
        """Whether every object has an outline, and every image the size that it is drawn in."""
        is_sized = all("height" in image and "width" in image for image in self.document["images"])
        return is_sized and all(annotation.get("segmentation") for annotation in self.document["annotations"])


def _numbered(annotations: list[dict[str, Any]], images: set[Any]) -> list[dict[str, Any]]:
    """Annotations of these images with all that pycocotools reads, numbered from 1: it takes number 0 for "no object".

    Raises KeyError, TypeError or ValueError for annotations of another form.
    """
    found: list[dict[str, Any]] = []
    for annotation in annotations:
        if annotation["image_id"] in images:
            _, _, width, height = map(float, annotation["bbox"])
            found.append({"iscrowd": 0, "area": width * height, **annotation, "id": len(found) + 1})
    return found


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def pycocotools(module: str) -> Any:
    """One module of pycocotools. Raises MissingExtraError without it."""
    import importlib

    try:
        return importlib.import_module(f"pycocotools.{module}")
    except ImportError as error:
        raise MissingExtraError("average precision needs pycocotools: pip install 'fxquant[detection]'") from error


def quiet() -> contextlib.AbstractContextManager[Any]:
    """pycocotools prints what it does."""
    return contextlib.redirect_stdout(io.StringIO())
