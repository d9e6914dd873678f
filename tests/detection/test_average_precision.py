"""Average precision of detectors whose answers are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fxquant.detection.average_precision import Precision, average_precision
from fxquant.detection.coco import CocoImages
from fxquant.errors import DataError, ModelError, OptionError
from tests.ranks_at_work import on_ranks

pytestmark = pytest.mark.quick
BOXES = {1: [[2.0, 3.0, 10.0, 8.0], [20.0, 12.0, 8.0, 10.0]], 2: [[5.0, 5.0, 12.0, 12.0]], 3: [[1.0, 1.0, 9.0, 9.0]]}


@pytest.fixture
def data(tmp_path: Path) -> CocoImages:
    """Three pictures of 24 x 32, each of one colour, that says which it is."""
    images, annotations = [], []
    for number, boxes in BOXES.items():
        Image.fromarray(np.full((24, 32, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 24, "width": 32})
        for box in boxes:
            x, y, w, h = box
            shape = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            known = {"id": len(annotations) + 1, "image_id": number, "category_id": 7, "iscrowd": 0}
            annotations.append({**known, "bbox": box, "area": w * h, "segmentation": shape})
    return CocoImages.of({"images": images, "annotations": annotations, "categories": [{"id": 7}]}, tmp_path, "three")


class Known(nn.Module):
    """Detects the boxes that are there, moved by some pixels in some of the pictures."""

    def __init__(self, moved: float, pictures: tuple[int, ...] = (1, 2, 3), label: int = 1) -> None:
        super().__init__()
        self.moved, self.pictures, self.label = moved, pictures, label

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        number = round(float(images[0][0, 0, 0]) * 255)
        boxes = torch.tensor(BOXES[number])
        boxes[:, 2:] += boxes[:, :2]
        boxes += self.moved if number in self.pictures else 0
        masks = torch.zeros(len(boxes), 1, 24, 32)
        for mask, (x1, y1, x2, y2) in zip(masks[:, 0], boxes.long().tolist(), strict=True):
            mask[max(y1, 0) : y2, max(x1, 0) : x2] = 1
        labels = torch.full((len(boxes),), self.label)
        return [{"boxes": boxes, "labels": labels, "scores": torch.full((len(boxes),), 0.9), "masks": masks}]


def test_what_is_there_is_found(data: CocoImages) -> None:
    found = average_precision(Known(0.0), data)
    assert {kind: round(precision.ap, 3) for kind, precision in found.items()} == {"box": 100.0, "mask": 100.0}
    assert (found["box"].images, found["box"].objects, found["box"].standard_error) == (3, 4, 0.0)


def test_boxes_beside_it_are_worth_less(data: CocoImages) -> None:
    near, far = average_precision(Known(1.0), data)["box"], average_precision(Known(9.0), data)["box"]
    assert far.ap == 0
    assert 0 < near.ap < 90
    assert near.ap50 == pytest.approx(100)
    drop, error = far.below(near)
    assert drop == near.ap
    assert error == pytest.approx(near.standard_error)


def test_the_standard_error_is_over_pictures(data: CocoImages) -> None:
    some = average_precision(Known(9.0, (1,)), data)["box"]
    assert 0 < some.ap < 100
    assert some.standard_error > 5
    assert average_precision(Known(9.0, (3,)), data, limit=2)["box"].ap == pytest.approx(100)
    with pytest.raises(OptionError, match="are of different images"):
        some.below(average_precision(Known(9.0, (3,)), data, limit=2)["box"])


def shared_out(rank: int, data: CocoImages) -> tuple[dict[str, Precision], list[int]]:
    """What two ranks find together, and which pictures this one has looked at."""
    seen: list[int] = []

    class Watched(CocoImages):
        def image(self, index: int) -> Tensor:
            seen.append(index)
            return super().image(index)

    return average_precision(Known(9.0, (1,)), Watched(data.document, data.folder, data.name)), seen


def test_pictures_are_shared_out_over_ranks(data: CocoImages, tmp_path: Path) -> None:
    alone = average_precision(Known(9.0, (1,)), data)
    assert on_ranks(2, tmp_path, shared_out, data) == [(alone, [0, 2]), (alone, [1])]


def of(data: CocoImages, **changed: Any) -> CocoImages:
    return CocoImages.of({**data.document, **changed}, data.folder, "changed")


def test_annotations_are_numbered_as_pycocotools_needs_it(data: CocoImages) -> None:
    bare = [{key: each[key] for key in ("image_id", "category_id", "bbox")} for each in data.document["annotations"]]
    for annotations in (bare, [{**each, "id": 0} for each in bare], [*bare, {**bare[0], "image_id": 99}]):
        found = average_precision(Known(0.0), of(data, annotations=annotations))
        assert found.keys() == {"box"}, "without outlines there is no precision of masks"
        assert (found["box"].ap, found["box"].objects) == (pytest.approx(100), 4)


def test_a_limit_is_spread_over_all_images(data: CocoImages) -> None:
    many = [{**image, "id": 3 * turn + image["id"]} for turn in range(2) for image in data.document["images"]]
    seen: list[int] = []

    class Looks(Known):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            seen.append(round(float(images[0][0, 0, 0]) * 255))
            return super().forward(images)

    average_precision(Looks(0.0), of(data, images=many), limit=3)
    assert seen == [1, 3, 2]


def test_no_precision_is_made_up(data: CocoImages) -> None:
    with pytest.raises(DataError, match="have no objects"):
        average_precision(Known(0.0), of(data, annotations=[]))
    with pytest.raises(DataError, match="limit must be at least 1"):
        average_precision(Known(0.0), data, limit=0)
    larger = [{**image, "height": 48, "width": 64} for image in data.document["images"]]
    with pytest.raises(DataError, match="is 24 x 32, and changed says 48 x 64"):
        average_precision(Known(0.0), of(data, images=larger))


def test_targets_are_what_a_detector_is_trained_towards(data: CocoImages) -> None:
    target = data.target(0, masks=True)
    assert target["boxes"].tolist() == [[2, 3, 12, 11], [20, 12, 28, 22]]
    assert target["labels"].tolist() == [1, 1]
    assert target["masks"].sum((1, 2)).tolist() == [80, 80]
    assert of(data, annotations=[]).target(0, masks=True)["masks"].shape == (0, 24, 32)


def test_other_answers_and_other_files_are_refused(data: CocoImages, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="labels up to 2, and three has 1 categories"):
        average_precision(Known(0.0, label=2), data)
    identity: Any = nn.Identity()
    with pytest.raises(ModelError, match="not give what a detector does"):
        average_precision(identity, data)
    with pytest.raises(DataError, match="there is no picture"):
        CocoImages.of(data.document, tmp_path / "nowhere", "three")
    first, *_ = data.document["annotations"]
    for changed, message in (
        ({"annotations": [{"image_id": 1}]}, "is no COCO file"),
        ({"annotations": [{**first, "bbox": [1, 2]}]}, "is no COCO file"),
        ({"annotations": [{**first, "category_id": 8}]}, "annotations of category 8, which it does not list"),
        ({"images": data.document["images"] * 2}, "has one id twice"),
        ({"images": []}, "has 0 images"),
    ):
        with pytest.raises(DataError, match=message):
            of(data, **changed)
    for text, message in (("[]", "is no COCO file"), ("{", "cannot be read as JSON")):
        (tmp_path / "no.json").write_text(text)
        with pytest.raises(DataError, match=message):
            CocoImages.open(tmp_path / "no.json", tmp_path)
    (tmp_path / "yes.json").write_text(json.dumps(data.document))
    with pytest.raises(DataError, match=r"^there is no picture"):
        CocoImages.open(tmp_path / "yes.json", tmp_path / "nowhere")
