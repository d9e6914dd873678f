"""Files that are no artefacts, or whose seal is right and whose content is not: each is refused by name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fxquant.artefact import artefact, container
from fxquant.errors import ArtefactError

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
    "unknown kind": (lambda g: set_in(g, ("modules", "fc", "weight", "kind"), "evil"), "no quantizer of kind 'evil'"),
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
