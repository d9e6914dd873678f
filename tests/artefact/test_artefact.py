"""Artefacts: small, bit-identical, written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
import timm
import torch
from safetensors import safe_open

from fxquant.artefact import artefact, container
from fxquant.data import embedded
from fxquant.errors import ArtefactError
from tests.quantized_by_hand import quantize_by_hand

TIMM_MODELS = {
    "vit_tiny_patch16_224": {"img_size": 32},
    "deit_tiny_distilled_patch16_224": {"img_size": 32},
    "eva02_tiny_patch14_224": {"img_size": 28},
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 48, "num_heads": 3},
}


FIRST_FILE = """
import sys
from fxquant.artefact import artefact
artefact.load(sys.argv[1])
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("name", TIMM_MODELS)
@pytest.mark.parametrize("bits", [3, 4])
def test_timm_models_load_to_bit_identical_outputs(name, bits, tmp_path):
    model = timm.create_model(name, depth=1, num_classes=7, **TIMM_MODELS[name])
    side = TIMM_MODELS[name]["img_size"]
    graph_module = quantize_by_hand(model, (3, side, side), bits, 6)
    path = tmp_path / "model.fxq"
    artefact.save(path, graph_module, card={})
    image = torch.randn(2, 3, side, side)
    assert torch.equal(artefact.load(path).graph_module(image), graph_module(image))
    sizes = artefact.size_breakdown(path)
    assert sizes["claimed_weight_bits"] > 100_000
    assert sizes["packed_weight_bytes"] * 8 <= 1.02 * sizes["claimed_weight_bits"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_embedded_model_loads_bit_identically_at_every_width(bits, tmp_path):
    model = embedded.build()
    model.blocks = model.blocks[:1]
    graph_module = quantize_by_hand(model, (1, 28, 28), bits, bits)
    artefact.save(tmp_path / "a.fxq", graph_module, card={"bits": bits})
    image = torch.randn(3, 1, 28, 28)
    loaded = artefact.load(tmp_path / "a.fxq").graph_module
    assert torch.equal(loaded(image), graph_module(image))
    assert loaded.state_dict().keys() == graph_module.state_dict().keys()


def test_vit_tiny_at_4_bits_is_small_and_loads_fast(tmp_path):
    # At 224 pixels there are 192 positions more, 147 kB of them: 3.3 MB in all.
    model = timm.create_model("vit_tiny_patch16_224", num_classes=200, img_size=32)
    graph_module = quantize_by_hand(model, (3, 32, 32), 4, 4)
    path = tmp_path / "vit_tiny.fxq"
    artefact.save(path, graph_module, card={"model": "vit_tiny"})
    sizes = artefact.size_breakdown(path)
    assert sizes["total_bytes"] == path.stat().st_size <= 3.3e6 - 192 * 192 * 4
    assert sizes["metadata_bytes"] < 60_000
    # The first file that a process reads: here other tests may have loaded what takes long.
    # One thread: where others share the processor, threads that wait for one another spin and count.
    result = subprocess.run(
        [sys.executable, "-c", FIRST_FILE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.stdout == "False\n", "torch's compiler is loaded to read a file, which takes over a second"
    loaded = artefact.load(path).graph_module
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(image), graph_module(image))


def test_card_allocation_and_journal_survive(small_bytes, tmp_path):
    path = tmp_path / "a.fxq"
    path.write_bytes(small_bytes)
    loaded = artefact.load(str(path))
    assert loaded.card == artefact.inspect_card(path) == {"protocol": "test"}
    assert loaded.allocation_json == '{"bits":5}'
    assert loaded.journal == [{"pass": "Trace"}]


def test_a_loaded_model_saves_to_the_same_bytes(small_bytes, tmp_path):
    path = tmp_path / "a.fxq"
    path.write_bytes(small_bytes)
    loaded = artefact.load(path)
    again = tmp_path / "b.fxq"
    artefact.save(
        again, loaded.graph_module, card=loaded.card, allocation_json=loaded.allocation_json, journal=loaded.journal
    )
    assert again.read_bytes() == small_bytes


def test_any_safetensors_tool_reads_the_card(small_bytes, tmp_path):
    (tmp_path / "a.fxq").write_bytes(small_bytes)
    with safe_open(tmp_path / "a.fxq", "pt") as file:
        assert json.loads(file.metadata()["card"]) == {"protocol": "test"}


def test_the_breakdown_adds_up(small_bytes, tmp_path):
    path = tmp_path / "a.fxq"
    path.write_bytes(small_bytes)
    sizes = artefact.size_breakdown(path)
    weights = (6 * 48, 5 * 6, 3 * 5)
    assert sizes["claimed_weight_bits"] == 5 * sum(weights)
    assert sizes["packed_weight_bytes"] == sum(-(-5 * count // 8) for count in weights)
    parts = ("packed_weight_bytes", "scale_bytes", "other_tensor_bytes", "metadata_bytes")
    assert sizes["total_bytes"] == len(small_bytes) == sum(sizes[part] for part in parts)


def test_equal_tensors_are_stored_once(tmp_path):
    tensors = {"a": torch.ones(1000), "b": torch.ones(1000), "c": torch.ones(10, 100), "d": torch.ones(1000).double()}
    container.write_file(tmp_path / "a", container.pack_file({}, tensors))
    assert container.stored_bytes(tmp_path / "a") == {"a": 4000, "c": 4000, "d": 8000}
    read = container.read_file(tmp_path / "a")[1]
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


# Writing


def test_an_existing_file_is_replaced(small, tmp_path):
    path = tmp_path / "a.fxq"
    path.write_text("old")
    artefact.save(path, small, card={"new": True})
    assert artefact.inspect_card(path) == {"new": True}
    assert os.listdir(tmp_path) == ["a.fxq"]
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"card": {"x": float("nan")}}, "the card cannot be written as JSON"),
        ({"card": {"x": object()}}, "the card cannot be written as JSON"),
        ({"card": ["x"]}, "the card is a list, not a dict"),
        ({"card": {}, "journal": [object()]}, "the journal cannot"),
        ({"card": {}, "allocation_json": "{"}, "the allocation is not a JSON text"),
        ({"card": {}, "allocation_json": {}}, "the allocation is not a JSON text"),
    ],
)
def test_a_failed_save_leaves_the_old_file(small, tmp_path, arguments, message):
    path = tmp_path / "a.fxq"
    path.write_text("old")
    with pytest.raises(ArtefactError, match=message):
        artefact.save(path, small, **arguments)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.fxq"]


def test_a_full_disk_leaves_the_old_file(small, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    path = tmp_path / "a.fxq"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ArtefactError, match="no space left"):
        artefact.save(path, small, card={})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.fxq"]


def test_folders_and_missing_folders_are_refused(small, tmp_path):
    with pytest.raises(ArtefactError, match="is a folder"):
        artefact.save(tmp_path, small, card={})
    with pytest.raises(ArtefactError, match="there is no folder"):
        artefact.save(tmp_path / "no" / "a.fxq", small, card={})
    with pytest.raises(ArtefactError, match="cannot be written"):
        artefact.save(tmp_path / ("n" * 300), small, card={})
    assert os.listdir(tmp_path) == []
