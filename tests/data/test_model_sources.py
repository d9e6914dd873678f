"""Models that do not come from timm, and weights under other names than timm's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fxquant.data.models import load_model, load_weights
from fxquant.errors import DataError, MissingExtraError, ModelError

pytestmark = pytest.mark.quick


class Saved(nn.Linear):
    """What transformers would have built from a folder."""

    missing: ClassVar[set[str]] = set()

    @classmethod
    def from_pretrained(cls, folder: str, **options: object) -> tuple[Saved, dict[str, set[str]]]:
        assert options == {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
        return cls(2, 2), {"missing_keys": cls.missing}


class Backbone(Saved):
    pass


class Tower(Saved):
    pass


class Half(Saved):
    missing: ClassVar[set[str]] = {"pooler.dense.weight"}


TOWERS: dict[str, dict[str, object]] = {
    name: {"text_config": {}, "vision_config": {}} for name in ("ClipModel", "LlavaModel")
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake = SimpleNamespace(
        ViTForImageClassification=Saved, ViTModel=Backbone, ClipModel=Saved, ClipVisionModel=Tower, LlavaModel=Saved,
        YolosModel=Half,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "transformers", fake)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"]}))
    processor = {"size": {"height": 48, "width": 48}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path


def test_a_hugging_face_folder_brings_weights_and_preprocessing(folder) -> None:
    found = load_model(f"hf:{folder}")
    assert type(found.model) is Saved
    assert not found.is_random
    assert not found.model.training
    prepared = found.preprocessing
    assert (prepared.input_size, prepared.mean, prepared.std) == ((3, 48, 48), (0.1,) * 3, (0.2,) * 3)
    assert (prepared.interpolation, prepared.crop_pct, prepared.crop_mode) == ("bicubic", 1.0, "squash")


def test_a_processor_that_crops_is_a_share_of_the_resized_image(folder) -> None:
    processor = {"size": {"shortest_edge": 64}, "crop_size": 48, "do_center_crop": True, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    prepared = load_model(f"hf:{folder}").preprocessing
    assert (prepared.input_size, prepared.crop_pct, prepared.std) == ((3, 48, 48), 0.75, (1.0,) * 3)
    assert prepared.crop_mode == "center"


@pytest.mark.parametrize(("name", "kind"), [("ViTModel", Backbone), ("ClipModel", Tower)])
def test_a_folder_gives_the_class_that_it_names_or_its_image_tower(folder, name, kind) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": [name], **TOWERS.get(name, {})}))
    assert type(load_model(f"hf:{folder}").model) is kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("YolosModel", "lacks weights of Half, which would stay random: pooler.dense.weight"),
        ("TheirOwn", "no code of a folder is run"),
        ("LlavaModel", "reads texts beside images: save its image tower"),
    ],
)
def test_a_folder_that_gives_no_whole_image_model_is_refused(folder, name, message) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": [name], **TOWERS.get(name, {})}))
    with pytest.raises((DataError, ModelError), match=message):
        load_model(f"hf:{folder}")


@pytest.mark.parametrize(
    ("processor", "share", "mode"),
    [
        ({"size": {"shortest_edge": 56}, "crop_pct": 0.875}, 0.875, "center"),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875, "image_processor_type": "ConvNextImageProcessor"}, 1.0,
         "squash"),
        ({"size": {"shortest_edge": 56}, "image_processor_type": "LevitImageProcessor"}, 0.875, "center"),
        ({"size": 56, "feature_extractor_type": "LevitFeatureExtractor"}, 0.875, "center"),
        ({"size": 64, "crop_size": 56, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"}, 0.875,
         "center"),
        ({"size": 64, "crop_size": 56, "do_center_crop": True, "feature_extractor_type": "DeiTFeatureExtractor"}, 0.875,
         "squash"),
    ],
)  # fmt: skip
def test_processors_crop_a_share_of_what_they_resize(folder, processor, share, mode) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    prepared = load_model(f"hf:{folder}").preprocessing
    assert (prepared.crop_pct, prepared.crop_mode) == (share, mode)


def test_the_processor_of_texts_and_images_is_read_too(folder) -> None:
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 40}}))
    assert load_model(f"hf:{folder}").preprocessing.input_size == (3, 40, 40)


@pytest.mark.parametrize("other", [{"do_flip_channel_order": True}, {"rescale_factor": 1.0}, {"do_rescale": False}])
def test_a_processor_that_makes_other_pixels_is_refused(folder, other) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 48, **other}))
    with pytest.raises(DataError, match="in RGB, from 0 to 1"):
        load_model(f"hf:{folder}")


@pytest.mark.parametrize("content", ["{}}", '{"size": {"depth": 3}}', '{"resample": 17}', "[]"])
def test_a_processor_that_cannot_be_read_is_refused(folder, content) -> None:
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(DataError, match="does not say how images are prepared"):
        load_model(f"hf:{folder}")


def test_a_folder_that_is_none_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no Hugging Face folder, it has no config\.json"):
        load_model(f"hf:{tmp_path}")


@pytest.mark.parametrize(("name", "package"), [("open_clip:ViT-B-32", "open_clip_torch"), ("hf:", "transformers")])
def test_a_package_that_is_absent_is_named_with_what_installs_it(folder, name, package, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=f"pip install {package}"):
        load_model(f"hf:{folder}" if name == "hf:" else name)


def test_torchvisions_models_have_torchvisions_preprocessing(tmp_path) -> None:
    found = load_model("torchvision:mobilenet_v3_small", None, 7)
    assert found.is_random
    prepared = found.preprocessing
    assert (prepared.input_size, prepared.crop_pct, prepared.interpolation) == ((3, 224, 224), 0.875, "bilinear")
    state = {name: torch.ones_like(tensor) for name, tensor in found.model.state_dict().items()}
    torch.save(state, tmp_path / "net.pth")
    again = load_model("torchvision:mobilenet_v3_small", tmp_path / "net.pth", 7)
    assert (again.weights, again.is_random) == ("net.pth", False)
    assert torch.equal(again.model.classifier[3].weight, torch.ones(7, 1024))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:vit_x", "no torchvision model is called 'vit_x'"),
        ("torchvision:vit_b_16", "cannot be built with .*colour.*check its options"),
        ("nowhere.at_all:build", r"nowhere\.at_all cannot be imported .* module:factory of your own"),
        ("own_model:other", "own_model has no 'other'"),
        ("own_model:text", "returns a str, not a torch.nn.Module"),
    ],
)
def test_a_model_that_cannot_be_found_or_built_is_refused(tmp_path, monkeypatch, name, message) -> None:
    (tmp_path / "own_model.py").write_text("def text(**options): return 'model'\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(name, colour=3)
    sys.modules.pop("own_model", None)


def test_a_factory_of_the_users_own_is_called_with_the_options(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\ndef build(width=2): return nn.Linear(width, 3)\nready = nn.Linear(4, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_model("my_models:build", width=5).model.in_features == 5
    assert load_model("my_models:ready").model.in_features == 4
    assert sys.path == before
    sys.modules.pop("my_models")


def swin() -> nn.Module:
    sizes = {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "window_size": 7}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **sizes)


def test_microsofts_swin_loads_into_timms(tmp_path) -> None:
    state = swin().state_dict()
    old = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): tensor
        for name, tensor in state.items()
    }
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    torch.save({"model": old}, tmp_path / "swin.pth")
    model = swin()
    load_weights(model, tmp_path / "swin.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=2, num_classes=3)


def test_jax_weights_load_by_timms_own_loader(tmp_path) -> None:
    random, model = np.random.RandomState(0), vit()
    block = "Transformer/encoderblock_0/"
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (16, 16, 3, 12), "embedding/bias": (12,), "cls": (1, 1, 12),
        "Transformer/posembed_input/pos_embedding": (1, 5, 12), "Transformer/encoder_norm/scale": (12,),
        "Transformer/encoder_norm/bias": (12,), "head/kernel": (12, 3), "head/bias": (3,),
        **{f"{block}LayerNorm_{i}/{part}": (12,) for i in (0, 2) for part in ("scale", "bias")},
        **{f"{block}MultiHeadDotProductAttention_1/{n}/kernel": (12, 2, 6) for n in ("query", "key", "value")},
        **{f"{block}MultiHeadDotProductAttention_1/{n}/bias": (2, 6) for n in ("query", "key", "value")},
        f"{block}MultiHeadDotProductAttention_1/out/kernel": (2, 6, 12),
        f"{block}MultiHeadDotProductAttention_1/out/bias": (12,),
        f"{block}MlpBlock_3/Dense_0/kernel": (12, 48), f"{block}MlpBlock_3/Dense_0/bias": (48,),
        f"{block}MlpBlock_3/Dense_1/kernel": (48, 12), f"{block}MlpBlock_3/Dense_1/bias": (12,),
    }  # fmt: skip
    arrays = {name: random.rand(*shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "vit.npz", **arrays)
    load_weights(model, tmp_path / "vit.npz")
    assert torch.equal(model.head.weight, torch.from_numpy(arrays["head/kernel"].T))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ModelError, match=r"other\.npz does not fit the model"):
        load_weights(vit(), tmp_path / "other.npz")
    with pytest.raises(ModelError, match=r"Linear reads no \.npz"):
        load_weights(nn.Linear(1, 1), tmp_path / "other.npz")
    with pytest.raises(DataError, match="not there"):
        load_weights(vit(), tmp_path / "missing.npz")


def test_open_clips_towers_have_the_preprocessing_of_their_weights(monkeypatch) -> None:
    def create_model(name: str, **options: object) -> SimpleNamespace:
        assert options == {"pretrained": None, "pretrained_hf": False}
        visual = nn.Linear(2, 2)
        visual.image_size = (48, 48)
        visual.preprocess_cfg = {"size": (48, 48), "mean": (0.4,) * 3, "std": (0.3,) * 3, "interpolation": "bicubic"}
        return SimpleNamespace(visual=visual)

    tags = {
        "SigLIP": {"mean": (0.5,) * 3, "std": (0.6,) * 3, "interpolation": None, "resize_mode": "squash"},
        "Long": {"resize_mode": "longest"},
    }
    fake = SimpleNamespace(
        create_model=create_model,
        list_pretrained_tags_by_model=lambda name: [name] if name in tags else [],
        get_pretrained_cfg=lambda name, tag: tags[tag],
    )
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    prepared = load_model("open_clip:SigLIP").preprocessing
    assert (prepared.mean, prepared.std, prepared.interpolation) == ((0.5,) * 3, (0.6,) * 3, "bicubic")
    assert prepared.crop_mode == "squash"
    other = load_model("open_clip:Other").preprocessing
    assert (other.mean, other.crop_mode) == ((0.4,) * 3, "center")
    with pytest.raises(DataError, match="resizes pictures by 'longest'"):
        load_model("open_clip:Long")
