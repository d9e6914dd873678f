"""Artefacts: small, bit-identical, written whole or not at all; and every bad file is an ArtefactError."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

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
import json, sys, time
from fxquant.artefact import artefact
began = time.process_time()
artefact.load(sys.argv[1])
print(json.dumps([time.process_time() - began, "torch._dynamo" in sys.modules]))
"""


@pytest.mark.parametrize("name", TIMM_MODELS)
@pytest.mark.parametrize("bits", [3, 4])
def test_timm_models_load_to_bit_identical_outputs(name, bits, tmp_path):
    model = timm.create_model(name, depth=2, num_classes=7, **TIMM_MODELS[name])
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
    graph_module = quantize_by_hand(embedded.build(), (1, 28, 28), bits, bits)
    artefact.save(tmp_path / "a.fxq", graph_module, card={"bits": bits})
    image = torch.randn(3, 1, 28, 28)
    loaded = artefact.load(tmp_path / "a.fxq").graph_module
    assert torch.equal(loaded(image), graph_module(image))
    assert loaded.state_dict().keys() == graph_module.state_dict().keys()


def test_vit_tiny_at_4_bits_is_small_and_loads_fast(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=200)
    graph_module = quantize_by_hand(model, (3, 224, 224), 4, 4)
    path = tmp_path / "vit_tiny.fxq"
    artefact.save(path, graph_module, card={"model": "vit_tiny"})
    sizes = artefact.size_breakdown(path)
    assert sizes["total_bytes"] == path.stat().st_size <= 3.3e6
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
    seconds, loads_compiler = json.loads(result.stdout)
    assert seconds < 1.5
    assert not loads_compiler, "torch's compiler is loaded to read a file, which takes over a second"
    loaded = artefact.load(path).graph_module
    image = torch.randn(1, 3, 224, 224)
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


# Files that are not artefacts


@pytest.mark.parametrize("read", [artefact.load, artefact.inspect_card, artefact.size_breakdown])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"hello, this is no artefact", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"\x80\x02}q\x00.", "not a safetensors file"),
    ],
)
def test_other_files_are_refused(read, content, message, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ArtefactError, match=message):
        read(tmp_path / "a")


def test_missing_files_folders_and_foreign_safetensors_are_refused(tmp_path):
    with pytest.raises(ArtefactError, match="not there"):
        artefact.load(tmp_path / "none")
    with pytest.raises(ArtefactError, match="a folder"):
        artefact.load(tmp_path)
    save_file({"weight": torch.ones(3)}, tmp_path / "foreign")
    with pytest.raises(ArtefactError, match="not an fxquant artefact"):
        artefact.load(tmp_path / "foreign")


def test_truncated_files_are_refused(small_bytes, tmp_path):
    path = tmp_path / "a.fxq"
    for length in (0, 4, 8, 100, len(small_bytes) // 2, len(small_bytes) - 1):
        path.write_bytes(small_bytes[:length])
        with pytest.raises(ArtefactError, match="truncated"):
            artefact.load(path)
    path.write_bytes(small_bytes + b"\0")
    with pytest.raises(ArtefactError):
        artefact.load(path)


def test_a_changed_weight_is_noticed(small_bytes, tmp_path):
    path = tmp_path / "a.fxq"
    path.write_bytes(small_bytes[:-1] + bytes([small_bytes[-1] ^ 1]))
    with pytest.raises(ArtefactError, match="damaged"):
        artefact.load(path)


def test_other_versions_are_refused(small_bytes, tmp_path):
    path = tmp_path / "a.fxq"
    path.write_bytes(small_bytes.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(ArtefactError, match=r"version '9'; this fxquant reads '1'"):
        artefact.load(path)


# Artefacts whose digest is right and whose content is not


def set_in(document, path, value):
    *parents, last = path
    for key in parents:
        document = document[key]
    document[last] = value


def node_named(graph, name):
    return next(node for node in graph["nodes"] if node["name"] == name)


GRAPH_EDITS = {
    "forward reference": (lambda g: node_named(g, "fc")["args"].__setitem__(0, {"node": 99}), "refers to node 99"),
    "self reference": (lambda g: g["nodes"][1]["args"].__setitem__(0, {"node": 1}), "refers to node 1"),
    "negative reference": (lambda g: g["nodes"][1]["args"].__setitem__(0, {"node": -1}), "refers to node -1"),
    "unknown op": (lambda g: g["nodes"][1].update(op="call_shell"), "unknown op 'call_shell'"),
    "function": (lambda g: g["nodes"][1].update(op="call_function", target="os.system"), "os.system"),
    "method": (lambda g: g["nodes"][1].update(op="call_method", target="__reduce_ex__"), "__reduce_ex__"),
    "attribute": (
        lambda g: g["nodes"][1].update(op="call_function", target="builtins.getattr", args=[{"node": 0}, "__class__"]),
        "__class__",
    ),
    "code in a name": (lambda g: g["nodes"][1].update(name="x = __import__('os')"), "is not a name"),
    "code in the input": (lambda g: g["nodes"][0].update(target="x=print(1)"), "is not a name"),
    "code in a keyword": (lambda g: g["nodes"][1].update(kwargs={"a=1, b": 1}), "is not a name"),
    "code in a path": (lambda g: node_named(g, "fc").update(target='fc"); print("x'), "is not a module path"),
    "dunder path": (lambda g: node_named(g, "fc").update(target="fc.__class__"), "is not a module path"),
    "method as path": (lambda g: g["modules"].update({"forward": g["modules"]["fc"]}), "is not a module path"),
    "missing module": (lambda g: node_named(g, "fc").update(target="none"), "which the graph does not have"),
    "unknown class": (lambda g: set_in(g, ("modules", "fc", "class"), "Popen"), "unknown class 'Popen'"),
    "nested class": (
        lambda g: set_in(g, ("modules", "norm", "inner"), dict(g["modules"]["norm"])),
        "not a plain module",
    ),
    "unknown setting": (lambda g: set_in(g, ("modules", "act", "device"), "cuda:99"), "unknown field 'device'"),
    "bits too many": (lambda g: set_in(g, ("modules", "fc", "weight", "bits"), 9), "9 bits"),
    "bits absurd": (lambda g: set_in(g, ("modules", "fc", "input", "bits"), 10**12), "1000000000000 bits"),
    "bits zero": (lambda g: set_in(g, ("modules", "fc", "weight", "bits"), 0), "0 bits"),
    "bits not a number": (lambda g: set_in(g, ("modules", "fc", "weight", "bits"), "5"), "'bits' is a str"),
    "other bits": (lambda g: set_in(g, ("modules", "fc", "weight", "bits"), 4), "30 codes of 4 bits"),
    "huge weight": (lambda g: set_in(g, ("modules", "fc", "shape"), [2**40, 2**40]), "takes .* MiB"),
    "empty weight": (lambda g: set_in(g, ("modules", "fc", "shape"), [2**40, 0]), "no weight of a QuantizedLinear"),
    "wrong weight": (lambda g: set_in(g, ("modules", "fc", "shape"), [5, 9]), "45 codes of 5 bits"),
    "huge scale": (lambda g: set_in(g, ("modules", "fc", "weight", "shape"), [2**40, 2**40]), "'fc"),
    "wrong scale": (
        lambda g: set_in(g, ("modules", "fc", "weight", "shape"), [4, 1]),
        r"expected torch.float32 \(4, 1\)",
    ),
    "huge norm": (
        lambda g: set_in(g, ("modules", "norm", "inner", "normalized_shape"), [2**45]),
        "norm.inner.*normalized_shape",
    ),
    "unknown kind": (lambda g: set_in(g, ("modules", "fc", "weight", "kind"), "evil"), "unknown quantizer kind 'evil'"),
    "weight kind": (
        lambda g: set_in(g, ("modules", "fc", "weight"), {"kind": "log2", "bits": 5}),
        "fc",
    ),
    "dtype": (lambda g: set_in(g, ("modules", "fc", "dtype"), "float99"), "'float99' is not a torch dtype"),
    "geometry": (lambda g: set_in(g, ("modules", "embed", "stride"), {"x": 1}), "'stride' is"),
    "shifts": (lambda g: set_in(g, ("modules", "norm", "input", "shift_large"), 10**9), "shifts"),
    "name twice": (lambda g: g["nodes"][2].update(name=g["nodes"][1]["name"]), "there twice"),
    "no output": (lambda g: g["nodes"].pop(), "exactly one output"),
    "no nodes": (lambda g: g.update(nodes=[]), "exactly one output"),
    "role": (lambda g: node_named(g, "fc")["notes"].update(role="king"), "'role' is 'king'"),
    "negative note": (lambda g: node_named(g, "fc")["notes"].update(macs=-1), "'macs' is -1"),
    "fact": (lambda g: g["facts"].append("blessed"), "'facts' is .*blessed"),
    "facts": (lambda g: g.update(facts=3), "'facts' is 3"),
    "no modules": (lambda g: g.pop("modules"), "has no 'modules'"),
    "class": (lambda g: g.update({"class": "x y"}), "is not a name"),
    "argument": (lambda g: g["nodes"][1]["args"].append({"pickle": "x"}), "cannot be read"),
    "device": (lambda g: g["nodes"][1]["args"].append({"device": "x y"}), "a device is 'x y'"),
}


@pytest.mark.parametrize("name", GRAPH_EDITS)
def test_bad_graphs_are_refused(name, edited):
    edit, message = GRAPH_EDITS[name]
    with pytest.raises(ArtefactError, match=message):
        artefact.load(edited(lambda graph, tensors, texts: edit(graph)))


TENSOR_EDITS = {
    "missing codes": (lambda t: t.pop("fc.weight_codes"), r"'fc.weight_codes' is missing"),
    "missing constant": (lambda t: t.pop("position"), "'position' is missing"),
    "constant shape": (lambda t: t.update(position=torch.ones(2, 2)), r"'position' has shape \(2, 2\)"),
    "short codes": (lambda t: t.update({"fc.weight_codes": t["fc.weight_codes"][:-1]}), "30 codes of 5 bits"),
    "code dtype": (lambda t: t.update({"fc.weight_codes": t["fc.weight_codes"].to(torch.int16)}), "int16"),
    "bias shape": (lambda t: t.update({"fc.bias": torch.ones(6)}), r"expected torch.float32 \(5,\)"),
    "bias dtype": (lambda t: t.update({"fc.bias": torch.ones(5).int()}), "'fc.bias' is torch.int32"),
    "NaN scale": (lambda t: t["fc.weight_quantizer.scale"].fill_(torch.nan), "NaN"),
    "zero scale": (lambda t: t["fc.weight_quantizer.scale"].zero_(), "not positive"),
    "infinite scale": (lambda t: t["fc.input_quantizer.scale"].fill_(torch.inf), "infinite"),
    "scale dtype": (
        lambda t: t.update({"fc.input_quantizer.scale": t["fc.input_quantizer.scale"].double()}),
        "is torch.float64, expected torch.float32",
    ),
}


@pytest.mark.parametrize("name", TENSOR_EDITS)
def test_bad_tensors_are_refused(name, edited):
    edit, message = TENSOR_EDITS[name]
    with pytest.raises(ArtefactError, match=message):
        artefact.load(edited(lambda graph, tensors, texts: edit(tensors)))


TEXT_EDITS = {
    "no graph": (lambda t: t.pop("graph"), "graph"),
    "no card": (lambda t: t.pop("card"), "the card .* is not JSON"),
    "card is a list": (lambda t: t.update(card="[]"), "is a list, not a dict"),
    "journal": (lambda t: t.update(journal="%%%"), "the journal .* cannot be decompressed"),
    "unfinished": (lambda t: t.update(journal=t["journal"][:8]), "the journal .* cannot be decompressed"),
    "allocation": (lambda t: t.update(allocation=container.compress("{")), "the allocation is not a JSON text"),
    "deep": (lambda t: t.update(card="[" * 100_000), "the card .* is not JSON"),
}


@pytest.mark.parametrize("name", TEXT_EDITS)
def test_bad_texts_are_refused(name, edited):
    edit, message = TEXT_EDITS[name]
    with pytest.raises(ArtefactError, match=message):
        artefact.load(edited(lambda graph, tensors, texts: edit(texts)))


@pytest.mark.parametrize("key", ["journal", "allocation"])
def test_texts_that_unfold_to_absurd_lengths_are_refused(edited, key):
    path = edited(lambda graph, tensors, texts: texts.update(journal=container.compress(" " * 2**20 + "[]")))
    assert artefact.load(path).journal == []
    text = container.compress(" " * 2**24 + "[]")
    path = edited(lambda graph, tensors, texts: texts.update({key: text}))
    with pytest.raises(ArtefactError, match=rf"the {key} .* too long"):
        artefact.load(path)


# Anything at all

fuzzing = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@fuzzing
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4), st.booleans())
def test_flipped_bytes_never_raise_anything_else(small_bytes, tmp_path, flips, in_header):
    content = bytearray(small_bytes)
    length = int.from_bytes(content[:8], "little") + 8 if in_header else len(content)
    for place, change in flips:
        content[place % length] ^= change
    (tmp_path / "a").write_bytes(bytes(content))
    for read in (artefact.load, artefact.inspect_card, artefact.size_breakdown):
        try:
            read(tmp_path / "a")
        except ArtefactError:
            continue


JUNK = [
    None, True, False, 0, -1, 1, 7, 2**40, 2**70, -(2**63), 1e308, 0.5, "", "x", "weight", "call_module", "float16",
    "torch.relu", "__class__", "a.b.c", [], [[]], [1, 2], {}, {"node": 0}, {"tuple": [1]}, {"dict": [[[], 1]]},
    {"slice": [1]}, {"float": "inf"}, {"dtype": []}, {"device": 3}, {"format": {}}, {"ellipsis": 1}, {"class": "ReLU"},
]  # fmt: skip


def places(document, path=()):
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def mutate(graph, dice):
    """Replace, delete, duplicate or swap something somewhere."""
    found = list(places(graph))[1:]
    *parents, last = dice.choice(found)
    owner = graph
    for key in parents:
        owner = owner[key]
    action = dice.randrange(4)
    if action == 0:
        del owner[last]
    elif action == 1 and isinstance(owner, list):
        owner.insert(dice.randrange(len(owner) + 1), owner[last])
    elif action == 2:
        other = graph
        for key in dice.choice(found):
            other = other[key]
        owner[last] = json.loads(json.dumps(other))
    else:
        owner[last] = json.loads(json.dumps(dice.choice(JUNK)))


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's, about the forward of a graph that makes no sense
@fuzzing
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_changed_graphs_load_or_raise_artefact_errors(edited, seed, count):
    def change(graph, tensors, texts):
        dice = random.Random(seed)
        for _ in range(count):
            mutate(graph, dice)

    path = edited(change)
    for read in (artefact.load, artefact.size_breakdown):
        try:
            read(path)
        except ArtefactError:
            continue
