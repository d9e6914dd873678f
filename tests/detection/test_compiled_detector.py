"""A detector quantized as one model under one budget, called as the detector is."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from allocators.milp import Milp
from fxquant.detection.backbones import timm_backbone
from fxquant.detection.compiled_detector import CompiledDetector, Cuts, load_detector
from fxquant.detection.composite import Composite, Parts
from fxquant.detection.session import DetectorSession
from fxquant.errors import CalibrationError, InputError, ModelError, VerificationError
from tests.detection.tiny_detectors import (
    REGIONS,
    pictures,
    tiny_cascade,
    tiny_compiled,
    tiny_mask_rcnn,
    tiny_session,
)
from tests.stand_in_device import stand_in


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def test_a_list_of_pictures_gives_what_the_detector_gives() -> None:
    given = [pictures()[0], torch.rand(3, 30, 50)]
    found, expected = tiny_compiled()(given), tiny_mask_rcnn()(given)
    for one, other, picture in zip(found, expected, given, strict=True):
        assert one.keys() == other.keys() == {"boxes", "labels", "scores", "masks"}
        assert one["masks"].shape[2:] == picture.shape[1:]
        assert float(one["scores"][0]) == pytest.approx(float(other["scores"][0].detach()), rel=0.05)
    assert tiny_compiled()([]) == []


def test_what_is_compiled_on_a_device_is_what_the_cpu_makes() -> None:
    options: Any = {"recipe": "naive_min_max", "image_sizes": [(32, 64)], "bits": (4, 8)}
    there = fxquant.compile_detector(
        tiny_mask_rcnn().to(stand_in()), "W8A8", calibration=pictures(), regions=REGIONS, **options
    )
    here = tiny_compiled().state_dict()
    assert all(torch.equal(tensor.cpu(), here[name]) for name, tensor in there.state_dict().items())
    with pytest.raises(InputError, match="picture 0 is on cpu, and the detector is on standin:0"):
        there(pictures())
    found = there([picture.to(stand_in()) for picture in pictures()])
    assert same([{name: tensor.cpu() for name, tensor in each.items()} for each in found], tiny_compiled()(pictures()))


def test_no_other_pictures_are_made_where_regions_ride_along() -> None:
    compiled = fxquant.compile_detector(
        tiny_mask_rcnn(), "W8A8", calibration=pictures(), regions=REGIONS, image_sizes=[(32, 64)], bits=(4, 8)
    )
    (views,) = [entry.notes["views"] for entry in compiled.compiled.journal.entries if "views" in entry.notes]
    assert views == 0


def test_all_parts_share_one_budget() -> None:
    compiled = tiny_session().compile("W6A6", Milp())
    report = compiled.report()
    layers = [row.layer for row in report.layers]
    for part in ("backbone.body.layers_0", "backbone.fpn", "rpn_head.conv", "heads.0.", "heads.1."):
        assert any(layer.startswith(part) for layer in layers), part
    assert report.card["multiply_accumulates"]["float_share"] == 0
    assert report.allocation is not None
    assert 5 < report.allocation.usage["mean_weight_bits"] <= 6
    assert {row.weight_bits for row in report.layers if row.weight_bits} == {4, 8}


def test_a_file_goes_into_a_detector_built_like_it(tmp_path: Path) -> None:
    tiny_compiled().save(tmp_path / "detector.fxq")
    other = tiny_mask_rcnn()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert same(load_detector(tmp_path / "detector.fxq", other)(pictures()), tiny_compiled()(pictures()))
    with pytest.raises(ModelError, match="heads for box, box, box"):
        load_detector(tmp_path / "detector.fxq", tiny_cascade())


def test_integers_give_what_is_simulated() -> None:
    lowered = tiny_compiled().lowered("cpu-native")
    found, expected = lowered(pictures()), tiny_compiled()(pictures())
    assert "simulated" not in {row.execution for row in lowered.report().layers}
    assert found[0]["scores"][0] == pytest.approx(float(expected[0]["scores"][0]), rel=0.02)


def test_copies_detect_alike() -> None:
    assert same(copy.deepcopy(tiny_compiled())(pictures()), tiny_compiled()(pictures()))


def test_where_nothing_is_detected_there_are_no_masks() -> None:
    strict = tiny_mask_rcnn()
    strict.roi_heads.score_thresh = 1.1
    (found,) = CompiledDetector(strict, tiny_compiled().compiled, REGIONS)(pictures(1))
    assert found["masks"].shape == (0, 1, 40, 40)


def test_pictures_are_padded_to_a_size_that_holds_them() -> None:
    (found,) = tiny_compiled()([torch.rand(3, 20, 38)])  # 32 x 61 for the detector
    assert len(found["boxes"])
    with pytest.raises(InputError, match=r"fit none of the sizes .* 32 x 32, 32 x 64"):
        tiny_compiled()([torch.rand(3, 80, 40)])
    for wrong, message in (
        ([torch.full((3, 40, 40), float("nan"))], "picture 0 has NaN or infinite"),
        ([*pictures(1), torch.rand(1, 40, 40)], r"picture 1 is \(1, 40, 40\) of torch.float32"),
        ([torch.rand(3, 40, 40).double()], "of torch.float64"),
        ([torch.rand(3, 0, 40)], "picture 0"),
        ([[0.0]], "picture 0 is a list"),
        (None, "not a NoneType"),
    ):
        with pytest.raises(InputError, match=message):
            tiny_compiled()(wrong)


def test_a_cut_that_computes_something_else_is_found() -> None:
    compiled = tiny_compiled().compiled
    Cuts(compiled.graph_module, compiled.tree, tiny_compiled().parts).check(compiled.graph_module)
    other = copy.deepcopy(compiled)
    other.graph_module.get_submodule("rpn_head.cls_logits").weight.mul_(2)
    cuts = Cuts(other.graph_module, compiled.tree, tiny_compiled().parts)
    with pytest.raises(VerificationError, match="a part of the quantized detector"):
        cuts.check(compiled.graph_module)


@pytest.mark.quick
def test_what_is_no_detector_or_no_picture_is_refused() -> None:
    with pytest.raises(ModelError, match=r"fxquant.compile\(detector.backbone"):
        Parts.of(nn.Linear(2, 2), REGIONS)
    with pytest.raises(ModelError, match=r"MaskRCNN is a detector.*fxquant.compile_detector"):
        fxquant.compile(tiny_mask_rcnn(), "W8A8", calibration=torch.rand(2, 3, 32, 32))
    grey, coarse = [torch.rand(1, 40, 40)], [torch.rand(3, 40, 40).double()]
    for wrong in ([], torch.rand(2, 3, 40, 40), [torch.rand(40, 40)], grey, coarse):
        with pytest.raises(CalibrationError, match=r"picture|calibration must be a list"):
            DetectorSession(tiny_mask_rcnn(), wrong)  # type: ignore[arg-type]


@pytest.mark.quick
def test_a_backbone_is_of_several_resolutions_or_a_plain_vit() -> None:
    for name, options, message in (
        ("mixer_s32_224", {}, "not of several resolutions"),
        ("vit_tiny_patch16_224", {"size": 3}, "cannot be built with .*'size': 3"),
    ):
        with pytest.raises(ModelError, match=message):
            timm_backbone(name, **options)


def test_a_detector_is_left_as_it_was() -> None:
    detector = tiny_session().detector
    assert type(detector.backbone).__name__ == "PyramidBackbone"
    assert detector.roi_heads.box_roi_pool.scales is None


@pytest.mark.parametrize("options", [{"masks": 1}, {"agnostic": False, "convolutions": 1}])
def test_a_cascade_has_a_head_for_each_stage(options: dict[str, Any]) -> None:
    detector = tiny_cascade(**options)
    (found,) = detector(pictures(1))
    assert ("masks" in found) == ("masks" in options)
    parts = Parts.of(detector, REGIONS)
    assert [head.kind for head in parts.heads] == ["box"] * 3 + ["mask"] * 3 * ("masks" in options)
    regions = parts.found_by(detector, pictures(1)[0])
    assert not torch.equal(regions[0], regions[1])  # each stage moves its boxes
    planes = parts.planes.packed(torch.rand(1, 3, 32, 32), [found[None] for found in regions])
    output = Composite(detector, parts).eval()(planes)
    assert [len(found) for found in output["features"]] == [head.count for head in parts.heads]
    with pytest.raises(ModelError, match="not trained here"):
        detector.train()(pictures(1), [{"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1])}])
