"""Sealed files that mean harm: nothing off the lists runs, the caller's images stay, nothing grows out of hand."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.artefact import artefact
from fxquant.artefact.module_json import module_from_json
from fxquant.checks.untrusted import check_path, from_json, to_json
from fxquant.commands.inspect_artefact import report_of
from fxquant.errors import ArtefactError
from fxquant.graph.printer import format_graph
from fxquant.runtime.layer_row import LayerRow
from tests.artefact.mutations import Base, mutated, seal
from tests.artefact.use import use


def call(name, target, *args, op="call_function", **options):
    return {"name": name, "op": op, "target": target, "args": list(args), "kwargs": options}


IMAGE = {"node": 0}
CONSTANT = {"name": "c", "op": "get_attr", "target": "position"}
ONE = call("v", "new_zeros", IMAGE, 1, op="call_method")


def before_output(*records):
    """Nodes between the first and the rest: they may refer to the image, and nobody needs them."""

    def edit(graph):
        shift = len(records)
        text = json.dumps(graph["nodes"][1:])
        later = json.loads(text, object_hook=lambda d: {"node": d["node"] + shift} if set(d) == {"node"} else d)
        graph["nodes"][1:] = [*records, *later]

    return edit


HOSTILE = {
    "a value named self": (before_output(call("self", "contiguous", IMAGE, op="call_method")), "'self' is not a name"),
    "a value named torch": (before_output(call("torch", "torch.relu", IMAGE)), "'torch' is not a name"),
    "an input named self": (lambda g: g["nodes"][0].update(target="self"), "'self' is not a name"),
    "an input that hides a function": (lambda g: g["nodes"][0].update(target="getattr"), "'getattr' is not a name"),
    "an input with a default": (lambda g: g["nodes"][0].update(args=[1]), "does not begin with its inputs"),
    "a method of a text": (before_output(call("n", "format", "{0}", op="call_method")), "method 'format'"),
    "a method of a size": (
        before_output(
            call("s", "builtins.getattr", IMAGE, "shape"), call("n", "contiguous", {"node": 1}, op="call_method")
        ),
        "called on a Size",
    ),
    "a listed method of a text": (before_output(call("n", "split", "a b", op="call_method")), "called on a str"),
    "text arithmetic": (before_output(call("n", "operator.mod", "%9999999999d", 1)), "a text or a dict"),
    "a repeated sequence": (before_output(call("n", "operator.mul", {"tuple": [1]}, 10**9)), "a sequence is repeated"),
    "a power": (before_output(call("n", "operator.pow", 9, 10**9)), "the exponent of a power is more than"),
    "a whole number that grows": (
        before_output(call("n", "operator.mul", 2**62, 2**62)),
        "does not fit 64 bits",
    ),
    "writing to the image": (before_output(call("n", "add_", IMAGE, 1, op="call_method")), "writes to the image"),
    "writing to a view of the image": (
        before_output(call("v", "operator.getitem", IMAGE, 0), call("n", "mul_", {"node": 1}, 2, op="call_method")),
        "writes to the image",
    ),
    "writing to the image by a keyword": (
        before_output(call("n", "functional.relu", IMAGE, inplace=True)),
        "writes to the image",
    ),
    "writing to the image by an operator": (before_output(call("n", "operator.iadd", IMAGE, 1)), "writes to the image"),
    "writing to a constant": (
        before_output(CONSTANT, call("n", "sub_", {"node": 1}, 1, op="call_method")),
        "writes to the image or to a constant",
    ),
    "out=": (before_output(call("n", "torch.add", IMAGE, IMAGE, out=IMAGE)), "may not give.*out"),
    "another device": (before_output(call("n", "torch.zeros", 2, device={"device": "cuda:7"})), "a device is 'cuda:7'"),
    "another kind of tensor": (before_output(call("n", "torch.zeros", 2, dtype={"dtype": "complex64"})), "complex64"),
    "a large tensor": (before_output(call("n", "torch.zeros", 10**9)), "more than such a file needs"),
    "a large range": (before_output(call("n", "torch.arange", 10**12)), "more than such a file needs"),
    "a large view": (
        before_output(ONE, call("n", "expand", {"node": 1}, 10**9, op="call_method")),
        "more than such a file needs",
    ),
    "a repeated tensor": (before_output(call("n", "repeat", IMAGE, 10**6, 1, 1, 1, op="call_method")), "more than"),
    "a padded tensor": (before_output(call("n", "functional.pad", IMAGE, {"tuple": [10**8, 0]})), "more than such"),
    "a resized tensor": (before_output(call("n", "functional.interpolate", IMAGE, 10**5)), "more than such"),
    "an index that is not there": (before_output(call("n", "operator.getitem", IMAGE, 7)), "cannot run"),
    "many constants": (
        before_output(*(call(f"n{i}", "torch.zeros", [1] * 50_000) for i in range(3))),
        "more constants",
    ),
    "a module nobody calls": (lambda g: g["modules"].update(spare=g["modules"]["act"]), "no node calls"),
    "a setting that is on no list": (
        lambda g: next(iter(g["modules"][k] for k in g["modules"] if k == "act")).update(inplace=True),
        "unknown field 'inplace'",
    ),
    "deep modules": (
        lambda g: g["modules"].update({f"m{i}" + ".a" * 200: {"class": "ReLU"} for i in range(100)}),
        "more than 10000 modules",
    ),
    "a decision by an image": (before_output(call("n", "torch._assert", IMAGE, "why")), "makes a number of a tensor"),
    "a number from an image": (before_output(call("n", "builtins.max", IMAGE, 1)), "makes a number of a tensor"),
    "classes that an image counts": (before_output(call("n", "functional.one_hot", IMAGE)), "number of classes"),
    "two outputs": (
        lambda g: g["nodes"][-1].update(args=[{"tuple": [g["nodes"][-1]["args"][0], IMAGE]}]),
        "returns 2 tensors, and its output has places for 1",
    ),
    "tensors from one node": (
        lambda g: (
            g["nodes"].insert(-1, call("n", "unbind", *g["nodes"][-1]["args"], op="call_method"))
            or g["nodes"][-1].update(args=[{"node": len(g["nodes"]) - 2}])
        ),
        "the graph gives a tuple, not tensors",
    ),
    "no image": (lambda g: g.update(image_shape=[]), "no image of channels"),
    "another image": (lambda g: g.update(image_shape=[3, 9, 9]), "does not have the shape"),
    "a large image": (lambda g: g.update(image_shape=[3, 10**6, 10**6]), "does not have the shape"),
    "a shape that is not": (
        lambda g: next(n for n in g["nodes"] if n["name"] == "fc").update(shape=[2, 5, 4]),
        r"node fc gives torch.float32 \(2, 4, 5\) for 2 images, and the file says torch.float32 \(2, 5, 4\)",
    ),
    "a dtype that is not": (
        lambda g: next(n for n in g["nodes"] if n["name"] == "fc").update(dtype="float16"),
        "node fc gives torch.float32",
    ),
    "a shape of what is no tensor": (
        before_output(call("s", "builtins.getattr", IMAGE, "shape") | {"shape": [4]}),
        "gives a Size, and the file says a tensor",
    ),
    "many nodes": (lambda g: g.update(nodes=g["nodes"][:1] * 30_000), "at most 10000"),
    "a deep argument": (lambda g: g["nodes"][1]["args"].append(json.loads("[" * 200 + "]" * 200)), "nests deeper"),
    "a huge number": (lambda g: g["nodes"][1]["args"].append(10**400), "does not fit 64 bits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graphs_are_refused_when_they_are_loaded(name, edited):
    edit, message = HOSTILE[name]
    path = edited(lambda graph, tensors, texts: edit(graph))
    with pytest.raises(ArtefactError, match=message):
        artefact.load(path)


def test_an_index_in_a_constant_beyond_what_it_indexes_is_refused(edited):
    def edit(graph, tensors, texts):
        tensors["rows"] = torch.tensor([0, 99])
        before_output(
            {"name": "rows", "op": "get_attr", "target": "rows"},
            call("n", "torch.index_select", IMAGE, 1, {"node": 1}),
        )(graph)

    with pytest.raises(ArtefactError, match="cannot run"):
        artefact.load(edited(edit))


def test_names_of_what_a_graph_module_has_itself_are_no_module_paths():
    for name in ("_modules", "_buffers", "_graph", "graph", "training", "meta", "forward", "_forward_hooks", "a@1"):
        with pytest.raises(ArtefactError, match="not a module path"):
            check_path(f"a.{name}")


def test_many_names_of_one_weight_take_no_memory(edited):
    def edit(graph, tensors, texts):
        spec = {**graph["modules"]["fc"], "shape": [1000, 1000], "bias": False, "input": None}
        spec["weight"] = {"kind": "uniform", "bits": 2, "symmetric": True, "shape": []}
        for index in range(200):
            graph["modules"][f"m{index}"] = spec
            tensors[f"m{index}.weight_codes"] = torch.zeros(250_000, dtype=torch.uint8)
            tensors[f"m{index}.weight_quantizer.scale"] = torch.tensor(1.0)

    path = edited(edit)
    assert path.stat().st_size < 400_000
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ArtefactError, match=r"takes .* MiB"):
        artefact.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert time.process_time() - began < 5


TEXTS = {
    "not finite": ('{"a": NaN}', "NaN is no number"),
    "beyond floats": ('{"a": 1e999}', "beyond"),
    "a key twice": ('{"a": 1, "a": 2}', "the same key twice"),
    "half a character": ('{"a": "\\ud800"}', "is not JSON"),
    "half a character in a key": ('{"\\ud800": 1}', "is not JSON"),
    "a terminal's commands": ('{"a": "\\u001b[2J"}', "tell a terminal"),
    "a long number": ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_json_that_later_code_stumbles_over_is_refused(name):
    text, message = TEXTS[name]
    with pytest.raises(ArtefactError, match=message):
        from_json(text, dict, "the text")


def test_only_rms_norms_do_without_an_epsilon():
    norm = {"normalized_shape": [4], "eps": None, "elementwise_affine": False}
    assert module_from_json({"class": "RMSNorm", **norm}, "norm", {}).eps is None
    with pytest.raises(ArtefactError, match=r"'norm'.*'eps' is None"):
        module_from_json({"class": "LayerNorm", **norm, "bias": False}, "norm", {})


def test_what_could_not_be_read_again_is_not_written():
    for value in ({"a": 10**30}, {"a": "\ud800"}, {"a": float("inf")}):
        with pytest.raises(ArtefactError, match="the text"):
            to_json(value, "the text")


# Card, journal and allocation


KEPT = Path(__file__).parent / "files" / "vit_w4a4_format_1.fxq"
"""A ViT of one block on images of 16 x 16, recipe `best`, W4A4, as the first version with this format wrote it."""


def test_a_file_that_an_earlier_version_wrote_gives_the_scores_it_gave_then():
    loaded = fxquant.load(KEPT)
    images = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    scores = torch.tensor([[0.06526152, -0.07600299, -0.01042852, 0.05910203, 0.01843238]])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), scores, rtol=0, atol=1e-5)
    assert loaded.report().to_dict()["allocation"]["status"] == "optimal"
    assert format_graph(loaded.graph_module).count("[a3x4]") == 1, "of attention's second product"
    rows = {row.role: row for row in loaded.layers}
    assert rows["av"].input_bits == (3, 4)
    assert rows["av"].inputs[0].quantizer == "row-log"
    assert (rows["qkv"].weight_bits, rows["qkv"].input_bits, rows["qkv"].parameters) == (4, (4,), 768)
    assert LayerRow.from_dict(rows["av"].to_dict()) == rows["av"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"elements": "x"}, "'elements' is 'x'"),
        ({"source": "nowhere"}, "'source' is 'nowhere'"),
        ({"bits": -4}, "'bits' is -4"),
        ({"left": 1}, "unknown field 'left'"),
    ],
)
def test_operands_of_rows_are_held_against_a_schema(changes, message):
    operand = {"source": "weight", "elements": 3, "bits": 4, "sqnr_db": None, "quantizer": None, "pinned": False}
    row = {"layer": "head", "role": "head", "block": None, "macs": 3, "predicted_loss": 0.0, "execution": "simulated"}
    assert LayerRow.from_dict({**row, "operands": [operand]}).weight_bits == 4
    with pytest.raises(ArtefactError, match=message):
        LayerRow.from_dict({**row, "operands": [{**operand, **changes}]})
    with pytest.raises(ArtefactError, match="'operands' is"):
        LayerRow.from_dict({**row, "operands": [operand] * 3})
    with pytest.raises(ArtefactError, match="'operands' is"):
        LayerRow.from_dict({**row, "operands": []})


def _first(document):
    return document["card"]["layers"][0]


VALUES = {
    "parameters": (lambda d: _first(d).update(parameters="x"), "'parameters' is 'x'"),
    "layer": (lambda d: _first(d).update(layer={}), "'layer' is {}"),
    "bits": (lambda d: _first(d).update(weight_bits=-4), "'weight_bits' is -4"),
    "loss": (lambda d: _first(d).update(predicted_loss=None), "'predicted_loss' is None"),
    "another field": (lambda d: _first(d).update(extra=1), "unknown field 'extra'"),
    "no layers": (lambda d: d["card"].pop("layers"), "the list of layers"),
    "versions": (lambda d: d["card"].update(versions={"torch": 2}), "'versions'"),
    "stays float": (lambda d: d["card"].update(stays_float=[3]), "'stays_float'"),
    "ends": (lambda d: d["card"].update(first_last_weight_bits={"head": 3}), "'first_last_weight_bits'"),
    "step": (lambda d: d["journal"][0].update(step=5), "'step' is 5"),
    "seconds": (lambda d: d["journal"][0].update(seconds=[]), "'seconds' is"),
    "no entry": (lambda d: d["journal"].append(3), "a journal entry is a int"),
    "objective": (lambda d: d["allocation"].update(objective=10**400), "does not fit 64 bits"),
    "widths": (lambda d: d["allocation"]["weight_bits"].update(x=10**9), "'weight_bits'"),
    "usage": (lambda d: d["allocation"]["budget"].update(latency_ms=5.0), "lacks latency_ms"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_card_journal_and_allocation_are_held_against_their_types(name, tmp_path):
    edit, message = VALUES[name]
    base = Base.read(KEPT)
    documents = base.documents
    edit(documents)
    path = tmp_path / "edited.fxq"
    path.write_bytes(seal(documents, base.tensors))
    for read in (fxquant.load, report_of):
        with pytest.raises(ArtefactError, match=message):
            read(path)


@pytest.mark.parametrize("seed", range(0, 72, 12))
def test_changed_artefacts_are_used_or_refused(seed, tmp_path):
    base = Base.read(KEPT)
    for offset in range(12):
        changes, content = mutated(base, seed + offset)
        path = tmp_path / "case.fxq"
        path.write_bytes(content)
        untyped = [outcome for outcome in use(path, base.image_shape) if not outcome.is_typed]
        assert not untyped, f"seed {seed + offset}: {changes}: {untyped}"


CHANNELS = {
    "widths of another mean": (lambda out: [4] + [3] * (out - 1), "a mean of 3"),
    "widths beyond all": (lambda out: [9, 0, 0] + [3] * (out - 3), "2 to 8 bits"),
    "another number of channels": (lambda out: [3] * (out - 1), "not fit"),
    "as one may": (lambda out: [2, 4] + [3] * (out - 2), None),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_widths_of_channels_that_do_not_fit_are_refused(name, edited):
    widths_for, message = CHANNELS[name]

    def edit(graph, tensors, texts):
        spec = graph["modules"]["fc"]
        out, _ = spec["shape"]
        widths = torch.tensor(widths_for(out), dtype=torch.int8)[:, None]
        spec["weight"] = {"kind": "uniform-channels", "bits": 3, "channels": len(widths)}
        tensors["fc.weight_codes"] = torch.zeros(12, dtype=torch.uint8)
        tensors["fc.weight_quantizer.scale"] = torch.ones(len(widths), 1)
        tensors["fc.weight_quantizer.widths"] = widths

    if message is None:
        artefact.load(edited(edit))
        return
    with pytest.raises(ArtefactError, match=message):
        artefact.load(edited(edit))
