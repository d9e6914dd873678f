"""Models of Hugging Face's transformers, as they are: every attention found, and the ModelOutput that comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxquant
from fxquant.graph.annotation import Role, annotation_of
from tests.models import images, scrambled, traced

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.quick

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
WINDOWS: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViTForImageClassification": ("ViTConfig", SIZES, 1),
    "ViTModel": ("ViTConfig", SIZES, 1),
    "DeiTForImageClassification": ("DeiTConfig", SIZES, 1),
    "Dinov2Model": ("Dinov2Config", SIZES, 1),
    "CLIPVisionModel": ("CLIPVisionConfig", SIZES, 1),
    "SiglipVisionModel": ("SiglipVisionConfig", SIZES, 2),
    "BeitForImageClassification": ("BeitConfig", SIZES, 1),
    "SwinForImageClassification": ("SwinConfig", WINDOWS, 2),
    "Swinv2ForImageClassification": ("Swinv2Config", WINDOWS, 2),
    "YolosForObjectDetection": ("YolosConfig", {**SIZES, "image_size": [32, 32], "num_detection_tokens": 4}, 1),
}


def built(name: str) -> Any:
    configuration, sizes, _ = MODELS[name]
    return scrambled(getattr(transformers, name)(getattr(transformers, configuration)(**sizes)))


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_found(name) -> None:
    graph_module = traced(built(name), images(2, 32))
    found = [annotation_of(node).role for node in graph_module.graph.nodes]
    for role in (Role.QK, Role.SOFTMAX, Role.AV, Role.PROJ):
        assert found.count(role) == MODELS[name][2]


@pytest.mark.parametrize("name", ["ViTModel", "SwinForImageClassification"])
def test_a_model_output_comes_back_and_from_a_file_a_dict(name, tmp_path) -> None:
    model = built(name)
    options = {"output_hidden_states": True, "interpolate_pos_encoding": False}
    compiled = fxquant.compile(model, "W8A8", calibration=images(4), recipe="naive_min_max", inputs=options)
    with torch.no_grad():
        wanted, found = model(images(4), **options), compiled(images(4))
    assert type(found) is type(wanted)
    assert list(found) == list(wanted)
    assert len(found.hidden_states) == len(wanted.hidden_states)
    assert torch.cosine_similarity(found[0].flatten(), wanted[0].flatten(), 0) > 0.98
    compiled.save(tmp_path / "model.fxq")
    loaded = fxquant.load(tmp_path / "model.fxq")(images(4))
    assert type(loaded) is dict
    assert torch.equal(loaded["hidden_states"][0], found.hidden_states[0])
