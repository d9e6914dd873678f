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
from fxquant.errors import DataError, MissingExtraError


@dataclass(frozen=True)
class CocoImages:
    """Images with objects.

    Args:
        document: "images", "annotations" and "categories", as in a COCO file.
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
            found = cls.of(document, folder, Path(annotations).name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{annotations} is no COCO file of images, annotations and categories: {error!r}"
            ) from error
        return found

    @classmethod
    def of(cls, document: dict[str, Any], folder: str | PathLike[str], name: str) -> CocoImages:
        """The images of a document that has been read.

        Args:
            document: as in a COCO file.
            folder: of the pictures.
            name: what reports call the set.

        Raises DataError for a folder that is not there, an image without a picture, and a set without images.
        """
        places = [Path(folder) / str(image["file_name"]) for image in document["images"]]
        missing = next((place for place in places if not place.is_file()), None)
        if missing is not None:
            raise DataError(f"there is no picture {missing}: give the folder that the names in {name} belong to")
        if not places or not document["categories"]:
            raise DataError(f"{name} has {len(places)} images and {len(document['categories'])} categories")
        kept = {"images": document["images"], "annotations": document["annotations"]}
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
        """One picture, float32 (3, H, W) from 0 to 1, as torchvision's detectors take it."""
        place = self.folder / str(self.document["images"][index]["file_name"])
        try:
            with Image.open(place) as picture:
                pixels = np.array(picture.convert("RGB"))
        except (OSError, ValueError) as error:
            raise DataError(f"{place} cannot be read as a picture: {error}") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255

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
            target["masks"] = torch.from_numpy(np.stack([self.index.annToMask(found) for found in objects]))
        return target


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
