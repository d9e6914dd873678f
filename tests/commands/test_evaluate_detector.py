"""`fxquant evaluate --coco`: average precision of a float detector and of an artefact put into it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fxquant.cli import app
from tests.detection.tiny_detectors import tiny_compiled

FACTORY = "tests.detection.tiny_detectors:tiny_mask_rcnn"


@pytest.fixture
def coco(tmp_path: Path) -> list[str]:
    """One picture with one object."""
    Image.fromarray(np.full((40, 40, 3), 99, np.uint8)).save(tmp_path / "one.png")
    box = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [4, 4, 9, 9], "area": 81}
    image = {"id": 1, "file_name": "one.png", "height": 40, "width": 40}
    shape = {"segmentation": [[4, 4, 13, 4, 13, 13, 4, 13]]}
    kinds = [{"id": 1, "name": "one"}, {"id": 2, "name": "other"}]
    document = {"images": [image], "annotations": [box | shape], "categories": kinds}
    (tmp_path / "objects.json").write_text(json.dumps(document))
    return ["--coco", str(tmp_path / "objects.json"), "--data", str(tmp_path)]


def test_float_and_quantized(coco: list[str], tmp_path: Path) -> None:
    tiny_compiled().save(tmp_path / "detector.fxq")
    quantized = ["evaluate", str(tmp_path / "detector.fxq"), "--detector", FACTORY, *coco]
    for arguments in (["evaluate", FACTORY, *coco], quantized):
        found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
        assert {"ap", "ap50", "standard_error", "images", "objects"} <= found["mask"].keys() & found["box"].keys()
        assert found["box"]["images"] == found["box"]["objects"] == 1
    assert "(1 images, 1 objects) on objects.json" in CliRunner().invoke(app, quantized).stdout


@pytest.mark.quick
def test_what_is_missing_is_named(coco: list[str]) -> None:
    for arguments, message in (
        (["vit_tiny_patch16_224", *coco], "module:factory"),
        ([FACTORY, *coco[:2]], "--data FOLDER"),
        (["nowhere.fxq", "--detector", FACTORY, *coco], "nowhere.fxq is not there"),
    ):
        result = CliRunner().invoke(app, ["evaluate", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr.replace("\n", " ")


@pytest.mark.quick
def test_options_that_would_do_nothing_are_refused(coco: list[str], tmp_path: Path) -> None:
    weights = str(tmp_path / "weights.pth")
    for arguments, message in (
        ([FACTORY, "--mean", "1,1,1", "--labels", weights], "leave --labels, --mean out"),
        ([FACTORY, "--backend", "cpu-native"], "no artefact (.fxq): leave --backend out"),
        ([FACTORY, "--detector", FACTORY], "leave --detector out"),
        (["detector.fxq", "--detector", FACTORY, "--weights", weights], "leave --weights out"),
    ):
        result = CliRunner().invoke(app, ["evaluate", *arguments, *coco])
        assert result.exit_code == 2
        assert message in result.stderr.replace("\n", " ")


@pytest.mark.quick
def test_a_float_detector_takes_weights(coco: list[str], tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"none")
    result = CliRunner().invoke(app, ["evaluate", FACTORY, "--weights", str(tmp_path / "weights.pth"), *coco])
    assert result.exit_code == 2
    assert "cannot be read as a state dict" in result.stderr.replace("\n", " ")
