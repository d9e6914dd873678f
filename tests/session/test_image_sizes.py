"""One model for images of several sizes: a graph for each, one set of weights and quantizers."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.artefact.artefact import size_breakdown
from fxquant.artefact.graph_json import graph_to_json, graphs_from_json
from fxquant.artefact.shape_check import check_shapes
from fxquant.errors import (
    ArtefactError,
    CalibrationError,
    InputError,
    OptionError,
    PipelineError,
    TraceError,
    VerificationError,
)
from fxquant.session.compiled import Compiled
from passes.lower.lower import Lower
from passes.pipeline.pipeline import Pipeline
from passes.recipes import naive_min_max
from tests.models import SWIN, images, scrambled, timm_model, vit

WIDE, LARGE = (32, 48), (48, 48)


@functools.cache
def float_model() -> nn.Module:
    return vit(depth=1, dynamic_img_size=True, init_values=0.5)


@functools.cache
def several() -> Compiled:
    return fxquant.compile(float_model(), "W8A8", calibration=images(4), image_sizes=[WIDE, LARGE, (32, 32)])


def batch(size: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))


def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one.detach(), other.detach()).min())


@pytest.mark.parametrize("size", [(32, 32), WIDE, LARGE])
def test_every_size_computes_what_the_float_model_does_at_it(size) -> None:
    assert agreement(several()(batch(size)), float_model()(batch(size))) > 0.97


def test_a_size_that_was_not_declared_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"32 x 48, 48 x 48: .*image_sizes=\[\(height, width\)\]"):
        several()(batch((48, 32)))
    with pytest.raises(InputError, match="image_sizes"):
        fxquant.compile(float_model(), "W8A8", calibration=images(2), recipe="naive_min_max")(batch(WIDE))


def test_weights_and_quantizers_are_there_once(tmp_path: Path) -> None:
    other = several().sizes.graphs[LARGE]
    for path in {str(node.target) for node in other.graph.nodes if node.op == "call_module"}:
        assert other.get_submodule(path) is several().graph_module.get_submodule(path)
    one = fxquant.compile(float_model(), "W8A8", calibration=images(4))
    several().save(tmp_path / "several.fxq")
    one.save(tmp_path / "one.fxq")
    before, after = (size_breakdown(tmp_path / name) for name in ("one.fxq", "several.fxq"))
    assert after["packed_weight_bytes"] == before["packed_weight_bytes"]
    assert after["scale_bytes"] == before["scale_bytes"]


def test_files_copies_and_states_have_every_size(tmp_path: Path) -> None:
    several().save(tmp_path / "model.fxq")
    loaded, copied = fxquant.load(tmp_path / "model.fxq"), copy.deepcopy(several())
    for size in (WIDE, LARGE):
        assert torch.equal(loaded(batch(size)), several()(batch(size)))
    with torch.no_grad():
        for tensor in (*copied.sizes.buffers(), *copied.graph_module.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    copied.load_state_dict(several().state_dict())
    assert torch.equal(copied.to("cpu")(batch(LARGE)), several()(batch(LARGE)))


@pytest.mark.parametrize("size", [WIDE, LARGE])
def test_lowered_models_take_every_size_with_weights_packed_once(size) -> None:
    lowered = several().lowered("cpu-native")
    assert agreement(lowered(batch(size)), several()(batch(size))) > 0.9999
    shared = {id(buffer) for buffer in lowered.graph_module.buffers()}
    packed = [buffer for buffer in lowered.sizes.graphs[size].buffers() if buffer.nbytes > 4096]
    assert packed
    assert sum(id(buffer) in shared for buffer in packed) >= len(packed) - 1


def test_windows_that_pad_at_another_size_have_a_say_in_what_is_folded() -> None:
    model = timm_model(
        "swin_tiny_patch4_window7_224", **{**SWIN, "img_size": 32, "depths": (1, 1), "strict_img_size": False}
    )
    quantized = fxquant.compile(model, "W8A8", calibration=images(4), image_sizes=[(40, 56)], recipe="mptq_vit")
    assert agreement(quantized(batch((40, 56))), model(batch((40, 56)))) > 0.97


@pytest.mark.parametrize("shape", [[3, 32, 32], [1, 40, 40], [3, 32], [3, 0, 48]])
def test_files_whose_sizes_do_not_fit_together_are_refused(shape) -> None:
    document, tensors = graph_to_json(several().graph_module, several().sizes.graphs)
    document = json.loads(json.dumps(document))
    document["sizes"][0]["image_shape"] = shape

    def read() -> None:
        main, sizes = graphs_from_json(document, tensors)
        for graph_module in (main, *sizes.values()):
            check_shapes(graph_module, 10**6)

    with pytest.raises(ArtefactError, match=r"another height and width|states no image|shape of an image"):
        read()


class Grows(nn.Module):
    """A model with a layer, and with weights, that depend on the size of the image."""

    def __init__(self, further_layer: bool) -> None:
        super().__init__()
        self.embed, self.head, self.more = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 5), nn.Linear(8, 8)
        self.further_layer = further_layer

    def forward(self, images):
        x = self.embed(images).mean((2, 3))
        if not self.further_layer:
            return nn.functional.linear(x, images.shape[-1] * self.head.weight)
        return self.head(x if images.shape[-1] <= 32 else self.more(x))


@pytest.mark.parametrize(("further", "error", "says"), [(True, TraceError, "'more' is run at this size only"),
                                                        (False, VerificationError, "48 x 48.*by itself")])  # fmt: skip
def test_what_layers_of_the_main_size_cannot_compute_is_refused(further, error, says) -> None:
    with pytest.raises(error, match=says):
        fxquant.compile(
            scrambled(Grows(further)), "W8A8", calibration=images(4), recipe="naive_min_max", image_sizes=[LARGE]
        )


def test_an_onnx_file_takes_the_size_that_is_asked_for(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    quantized = fxquant.compile(
        scrambled(model), "W8A8", calibration=images(4), recipe="naive_min_max", image_sizes=[LARGE]
    )
    quantized.export_onnx(tmp_path / "large.onnx", image_size=LARGE)
    dimensions = onnx.load(tmp_path / "large.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dimension.dim_value for dimension in dimensions[1:]] == [3, *LARGE]
    with pytest.raises(OptionError, match="images of 32 x 32, 48 x 48, not of"):
        quantized.export_onnx(tmp_path / "other.onnx", image_size=WIDE)


def test_a_size_that_the_model_refuses_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"\(48, 48\) of image_sizes.*refuses"):
        fxquant.compile(vit(depth=1), "W8A8", calibration=images(4), recipe="naive_min_max", image_sizes=[LARGE])


@pytest.mark.parametrize("sizes", [[48], [(0, 32)], [(32,)], 48, [(32, k) for k in range(32, 64)], [("a", "b")]])
def test_sizes_that_are_none_are_refused(sizes) -> None:
    with pytest.raises(OptionError, match="image_sizes"):
        fxquant.compile(float_model(), "W8A8", calibration=images(4), image_sizes=sizes)


def test_sizes_that_cannot_work_are_refused_before_anything_runs() -> None:
    with pytest.raises(PipelineError, match="before Lower"):
        fxquant.Session(vit(depth=1), images(2), recipe=Pipeline([*naive_min_max("W8A8"), Lower()]), image_sizes=[WIDE])
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(torch.nn.Flatten().eval(), (images(3),), dynamic_shapes=(batch,), strict=False)
    with pytest.raises(OptionError, match="one size"):
        fxquant.Session(program, images(2), image_sizes=[WIDE])
