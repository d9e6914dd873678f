"""Names of classes become a model's classes: by ImageNet's list, by number, by a list given, in sorted order or not at
all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from fxquant.data.class_names import SORTED_ORDER, matched, read_classes, read_labels
from fxquant.data.images import ImageData
from fxquant.data.preprocessing import Preprocessing
from fxquant.errors import DataError, ModelError
from fxquant.measure.accuracy import evaluate

pytestmark = pytest.mark.quick

SMALL = Preprocessing((3, 8, 8))


class Reader(nn.Module):
    """Finds the class that a picture's red channel says, among `outputs`."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images_bchw: Tensor) -> Tensor:
        shades = ((images_bchw[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long()
        return nn.functional.one_hot(shades % self.outputs, self.outputs).float()


def folders(place: Path, shades: dict[str, int]) -> Path:
    for name, shade in shades.items():
        (place / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(place / name / "a.png")
    return place


def test_folders_of_some_of_imagenets_classes_are_matched_by_name(tmp_path: Path) -> None:
    names = ImageNetInfo().label_names()
    place = folders(tmp_path / "val", {names[index]: index for index in (3, 17, 200)})
    accuracy = evaluate(Reader(1000), ImageData.open(place, SMALL))
    assert (accuracy.correct, accuracy.count) == (3, 3)
    assert accuracy.labels == "by ImageNet's names of 1,000 classes"
    folders(place, {"n00000000": 1})
    with pytest.raises(DataError, match="3 of 4 classes have names of ImageNet's 1,000, and 'n00000000' is none"):
        evaluate(Reader(1000), ImageData.open(place, SMALL))


@pytest.mark.parametrize(("subset", "outputs"), [("imagenet-12k", 11821), ("imagenet-22k-ms", 21842)])
def test_larger_imagenets(subset: str, outputs: int) -> None:
    names = ImageNetInfo(subset).label_names()
    chosen = [7, outputs - 1, 500]
    found, how = matched([names[index] for index in chosen], outputs, "val")
    assert found == chosen
    assert f"{outputs:,}" in how


def test_wnids_of_a_smaller_model_are_in_sorted_order() -> None:
    names = sorted(ImageNetInfo().label_names()[::5])
    assert matched(names, 200, "val") == (list(range(200)), SORTED_ORDER)


def test_numbers_are_classes(tmp_path: Path) -> None:
    place = folders(tmp_path, {"0": 0, "17": 17, "9": 9})
    accuracy = evaluate(Reader(20), ImageData.open(place, SMALL))
    assert (accuracy.correct, accuracy.labels) == (3, "by the numbers that they are called by")
    with pytest.raises(DataError, match=r"3 classes .* and the model gives 10"):
        evaluate(Reader(10), ImageData.open(place, SMALL))


def test_names_that_say_nothing_are_refused_unless_there_are_as_many_as_classes(tmp_path: Path) -> None:
    place = folders(tmp_path, {"bee": 1, "ant": 0})
    accuracy = evaluate(Reader(2), ImageData.open(place, SMALL))
    assert (accuracy.correct, accuracy.labels) == (2, SORTED_ORDER)
    with pytest.raises(DataError, match=r"2 classes \(ant, bee, \.\.\.\) and the model gives 3.*--classes FILE"):
        evaluate(Reader(3), ImageData.open(place, SMALL))


def test_a_list_of_classes(tmp_path: Path) -> None:
    place = folders(tmp_path / "val", {"bee": 2, "ant": 0})
    (tmp_path / "names.txt").write_text("ant\nwasp\nbee\n\n")
    (tmp_path / "names.json").write_text(json.dumps({"2": "bee", "0": "ant", "1": "wasp"}))
    for classes in (tmp_path / "names.txt", str(tmp_path / "names.json"), ["ant", "wasp", "bee"]):
        assert evaluate(Reader(3), ImageData.open(place, SMALL, classes=classes)).correct == 2
    with pytest.raises(DataError, match="3 names of classes are given, but the model gives 4"):
        evaluate(Reader(4), ImageData.open(place, SMALL, classes=tmp_path / "names.txt"))
    with pytest.raises(DataError, match="not in the list of 2 names, such as 'bee'"):
        ImageData.open(place, SMALL, classes=["ant", "wasp"])


def test_a_file_of_labels(tmp_path: Path) -> None:
    for name, shade in (("a b.png", 4), ("c.png", 1)):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / name)
    (tmp_path / "labels.txt").write_text("# of two\na b.png 4\nc.png 1\n")
    (tmp_path / "labels.csv").write_text('image,label\n"a b.png",4\nc.png,1\n')
    (tmp_path / "names.csv").write_text("a b.png,e\nc.png,b\n")
    for file, classes in (("labels.txt", None), ("labels.csv", None), ("names.csv", list("abcde"))):
        data = ImageData.open(tmp_path, SMALL, labels=tmp_path / file, classes=classes)
        assert evaluate(Reader(5), data).correct == 2
    numbered = ImageData.open(tmp_path, SMALL, labels=tmp_path / "labels.txt", classes=["1", "4", "7"])
    assert numbered.checked_labels().tolist() == [1, 0], "numbers that the list has as names are these names"
    with pytest.raises(DataError, match="label 4, but the model gives 3 classes"):
        evaluate(Reader(3), ImageData.open(tmp_path, SMALL, labels=tmp_path / "labels.txt"))
    for text, message in (
        ("gone.png 1", "1 of 1 images are not there"), ("c.png", "line 1: expected an image and its class"),
        ("", "has no labels"),
    ):  # fmt: skip
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            ImageData.open(tmp_path, SMALL, labels=tmp_path / "bad.txt")


@pytest.mark.parametrize(
    "content", ["a\na", "a\n\nb", "", "[1, 2]", '{"0": "a", "2": "b"}', "[" * 5000, '{"x": "a"}', "\xff"]
)
def test_lists_of_classes_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "names").write_text(content, "latin-1")
    with pytest.raises(DataError, match="names"):
        read_classes(tmp_path / "names")


def test_a_csv_file_may_have_a_first_row(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("file,Class\na.png,3\n")
    assert read_labels(tmp_path / "l.csv") == [("a.png", "3")]


def test_a_model_that_cannot_take_the_images_is_named(tmp_path: Path) -> None:
    place = folders(tmp_path, {"0": 0})
    with pytest.raises(ModelError, match=r"cannot run on an image of shape \(3, 8, 8\)"):
        evaluate(nn.Linear(5, 5), ImageData.open(place, SMALL))
    assert torch.equal(ImageData.open(place, SMALL).for_outputs(1).labels, torch.tensor([0]))  # type: ignore[arg-type]
