"""Models of Hugging Face's transformers, as they are: every attention found, and the ModelOutput that comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxquant
from fxquant.data.models import load_model
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


STAGES: dict[str, Any] = {
    "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 8,
}  # fmt: skip
TEXTS: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
BOTH = {"text_config": TEXTS, "vision_config": SIZES}
SQUARE = {"size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    ("name", "configuration", "processor", "loaded"),
    [
        ("SegformerForSemanticSegmentation", ("SegformerConfig", STAGES), "SegformerImageProcessor", None),
        ("DeiTForImageClassification", ("DeiTConfig", SIZES), "ViTImageProcessor", None),
        ("SiglipModel", ("SiglipConfig", BOTH), "SiglipImageProcessor", "SiglipVisionModel"),
    ],
)  # fmt: skip
def test_a_folder_of_save_pretrained_gives_its_model(name, configuration, processor, loaded, tmp_path) -> None:
    model = scrambled(getattr(transformers, name)(getattr(transformers, configuration[0])(**configuration[1])))
    model.save_pretrained(tmp_path)
    getattr(transformers, processor)(**SQUARE).save_pretrained(tmp_path)
    found = load_model(f"hf:{tmp_path}")
    assert type(found.model).__name__ == (loaded or name)
    assert found.preprocessing.input_size == (3, 32, 32)
    state = model.state_dict()
    assert all(
        torch.equal(tensor, state[key if key in state else f"vision_model.{key}"])
        for key, tensor in found.model.state_dict().items()
    )
