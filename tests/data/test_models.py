"""Models by name and weights from disk: what is read, and what each bad file or option says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from fxquant.data import embedded
from fxquant.data.models import load_model, load_weights, parse_option
from fxquant.errors import DataError, ModelError


def small_vit(**options: object) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=4, **options)


def test_weights_from_safetensors_and_state_dicts(tmp_path: Path) -> None:
    state = small_vit().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "c.pth")
    for name in ("a.safetensors", "b.pth", "c.pth"):
        found = load_model("vit_tiny_patch16_224", tmp_path / name, 4, depth=1, img_size=32)
        assert all(torch.equal(value, state[key]) for key, value in found.model.state_dict().items())
        assert (found.weights, found.is_random, found.model.training) == (name, False, False)
    assert load_model("vit_tiny_patch16_224", depth=1).is_random


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = small_vit().state_dict()
    state["extra"] = state.pop("norm.weight")
    state["head.weight"] = torch.zeros(9, 9)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ModelError) as caught:
        load_weights(small_vit(), tmp_path / "a.pth")
    misfit = "head.weight is (9, 9) in the file and (4, 192)"
    for part in ("norm.weight is missing", "extra is not in the model", misfit):
        assert part in str(caught.value)
    torch.save({"x": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(ModelError, match=r"and .* more"):
        load_weights(small_vit(), tmp_path / "b.pth")


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 20)
    (tmp_path / "b.pth").write_bytes(b"x" * 20)
    torch.save(small_vit(), tmp_path / "pickled.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("a.safetensors", "not a whole safetensors file"),
        ("b.pth", "cannot be read as a state dict"),
        ("pickled.pth", "cannot be read as a state dict"),
        ("list.pth", "hold no state dict"),
        ("missing.pth", "are not there"),
    ):
        with pytest.raises(DataError, match=message):
            load_weights(small_vit(), tmp_path / name)


def test_bad_model_names_and_options() -> None:
    with pytest.raises(ModelError, match=r"close names: .*vit_tiny_patch16_224"):
        load_model("vit_tiny_patch16_22")
    with pytest.raises(ModelError, match="cannot be built"):
        load_model("vit_tiny_patch16_224", colour="red")
    with pytest.raises(ModelError, match="embedded"):
        load_model("embedded", num_classes=3)
    assert parse_option("img_size=96") == ("img_size", 96)
    assert parse_option("act_layer=gelu") == ("act_layer", "gelu")
    with pytest.raises(ModelError, match="name=value"):
        parse_option("img_size")


def test_weights_of_the_wrong_kind_are_named(tmp_path: Path) -> None:
    state = small_vit().state_dict()
    changes = {
        "complex64": {key: value.to(torch.complex64) for key, value in state.items()},
        "int64": {**state, "head.weight": state["head.weight"].long()},
        "bool": {**state, "head.weight": state["head.weight"].bool()},
        "without values": {**state, "head.weight": state["head.weight"].to("meta")},
    }
    for text, changed in changes.items():
        torch.save(changed, tmp_path / "a.pth")
        with pytest.raises(ModelError, match=text):
            load_weights(small_vit(), tmp_path / "a.pth")
    torch.save({**state, "module.head.weight": state["head.weight"]}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="a name twice"):
        load_weights(small_vit(), tmp_path / "a.pth")
    torch.save({0: torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="hold no state dict"):
        load_weights(small_vit(), tmp_path / "a.pth")
    torch.save(small_vit(), tmp_path / "a.pth")
    with pytest.raises(DataError, match=r"holds other Python objects.*save one with torch\.save") as refusal:
        load_weights(small_vit(), tmp_path / "a.pth")
    assert "weights_only" not in str(refusal.value), "nobody is told to unpickle it"
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(DataError, match="EOFError"):
        load_weights(small_vit(), tmp_path / "empty.pth")


def test_random_weights_are_the_same_and_leave_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small: dict[str, Any] = {"depth": 1, "embed_dim": 12, "num_heads": 2, "img_size": 32}
    first, second = (load_model("vit_tiny_patch16_224", **small).model.state_dict() for _ in range(2))
    load_model("torchvision:mobilenet_v3_small")
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_embedded_images_are_as_many_as_asked_for() -> None:
    assert len(embedded.test_images(3)[0]) == 3
    for read, count in ((embedded.test_images, 2001), (embedded.test_images, -1), (embedded.calibration_images, 513)):
        with pytest.raises(DataError, match="ask for fewer"):
            read(count)


def test_options_of_a_model_bring_no_weights() -> None:
    for option in ("pretrained", "checkpoint_path", "pretrained_cfg"):
        with pytest.raises(ModelError, match=f"{option} brings other weights"):
            load_model("vit_tiny_patch16_224", **{option: "x"})
    assert parse_option("a=" + "[" * 100_000)[0] == "a"
