"""The ONNX file: what is in it, what it computes in another runtime, what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.data import embedded
from fxquant.errors import ArtefactError, ExportError, MissingExtraError
from fxquant.export.onnx_check import check_in_onnxruntime
from fxquant.export.onnx_file import OnnxModel, to_onnx
from fxquant.graph.capture.tracing import trace
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.native import library
from tests.assertions import exact
from tests.export.runtimes import run_in_onnxruntime
from tests.models import ONE_BLOCK, SHALLOW, built, compiled, embedded_blocks, images
from tests.quantized_by_hand import SmallNet, quantize_by_hand

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def small() -> fxquant.Compiled:
    return compiled(ONE_BLOCK)


@pytest.fixture(scope="module")
def small_onnx(small: fxquant.Compiled) -> bytes:
    return to_onnx(small.graph_module, card=small.card).content


def test_an_export_is_checked_where_asked(
    small: fxquant.Compiled, small_onnx: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, answers = tmp_path / "small.onnx", small.answers
    assert answers is not None
    found = OnnxModel(small_onnx, {})
    monkeypatch.setattr(f"{fxquant.Compiled.__module__}.to_onnx", lambda *_, **__: found)  # made once for all tests
    small.export_onnx(path, check=True)
    assert path.read_bytes() == small_onnx
    path.unlink()
    wrong = replace(answers, simulated=answers.simulated.flip(1))
    broken = fxquant.Compiled(small.graph_module, None, small.journal, small.layers, small.card, wrong)
    with pytest.raises(ExportError, match=r"ONNX Runtime.* known answers: relative difference"):
        broken.export_onnx(path, check=True)
    with pytest.raises(ExportError, match="ONNX Runtime cannot run"):
        check_in_onnxruntime(b"nonsense", answers, images(2))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fxquant\[onnxruntime\]'"):
        small.export_onnx(path, check=True)
    assert not path.exists()


@pytest.mark.parametrize("architecture", SHALLOW)
def test_onnxruntime_computes_what_we_do(architecture: str, small: fxquant.Compiled, small_onnx: bytes) -> None:
    recipe = "adalog" if "deit3" in architecture else "mptq_vit"
    model = small if architecture == ONE_BLOCK else compiled(architecture, recipe=recipe, fully=True)
    x = images(8, built(architecture)[1], seed=5)
    content = small_onnx if architecture == ONE_BLOCK else to_onnx(model.graph_module).content
    found, truth = run_in_onnxruntime(content, x), exact(model.graph_module, x)
    off, scale = (found - truth).abs().amax(1), truth.abs().max()
    # As with our own kernels: equal but for images in which one code lay beside a threshold.
    assert (off < 4e-6 * scale).float().mean() >= 0.5
    assert off.max() < 0.1 * scale
    torch.testing.assert_close(run_in_onnxruntime(content, x[:1]), found[:1], rtol=0, atol=float(4e-6 * scale))


def test_embedded_model_gives_the_same_classes(tmp_path: Path) -> None:
    calibration = embedded.calibration_images(8)
    model = fxquant.compile(embedded_blocks(2), "W4A4", calibration=calibration, bits=(3, 4, 5))
    layers = model.export_onnx(tmp_path / "model.onnx")
    assert set(layers) == {row.layer for row in model.layers}
    assert set(layers.values()) == {"int8"}
    x = embedded.test_images(300)[0]
    found, truth = run_in_onnxruntime((tmp_path / "model.onnx").read_bytes(), x), exact(model.graph_module, x)
    top = truth.topk(2, 1).values
    margin = (top[:, 0] - top[:, 1])[found.argmax(1) != truth.argmax(1)]
    assert len(margin) <= 2
    assert (margin < 0.3).all()


def test_what_is_in_the_file(small: fxquant.Compiled, small_onnx: bytes) -> None:
    model = onnx.load_model_from_string(small_onnx)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert json.loads(model.metadata_props[0].value)["note"] == "a test"
    names = {node.name for node in model.graph.node}
    for layer in ("blocks.0.attn.qkv", "blocks.0.attn.qk", "blocks.0.mlp.fc1", "head"):
        assert f"{layer}/MatMul" in names
        assert f"{layer}/QuantizeLinear" in names
    weights = {i.name: i for i in model.graph.initializer}
    assert weights["blocks.0.mlp.fc1.weight.values"].data_type == onnx.TensorProto.INT8
    folders = (str(Path(torch.__file__).parent), str(Path(fxquant.__file__).parent))
    assert not any(folder.encode() in small_onnx for folder in folders)


def test_weights_of_four_bits_become_int4(small: fxquant.Compiled, small_onnx: bytes) -> None:
    narrow = to_onnx(small.graph_module, weight_type="int4").content
    kinds = {i.name: i.data_type for i in onnx.load_model_from_string(narrow).graph.initializer}
    assert kinds["blocks.0.mlp.fc1.weight.values"] == onnx.TensorProto.INT4
    initializers = {i.name: i for i in onnx.load_model_from_string(small_onnx).graph.initializer}
    codes = [name for name in initializers if name.endswith("weight.values")]
    assert len(codes) >= 5
    saved = sum(len(initializers[name].raw_data) for name in codes) / 2
    assert saved <= len(small_onnx) - len(narrow) < saved + 2000  # the card was not written
    x = images(4, seed=2)
    torch.testing.assert_close(run_in_onnxruntime(narrow, x), run_in_onnxruntime(small_onnx, x), rtol=0, atol=1e-4)


def test_weights_may_have_zero_points_and_float_layers_stay_float() -> None:
    graph_module = quantize_by_hand(SmallNet(), (3, 8, 8), 4, 4)
    head, fc = graph_module.get_submodule("head"), graph_module.get_submodule("fc")
    weight = head.weight
    head.weight_quantizer = UniformQuantizer(4, (weight.amax() - weight.amin()) / 15, 7)
    head.requantize(weight)
    assert fc.weight is not None  # derived from its codes, which it has no more in the next line
    fc.weight_quantizer = fc.weight_codes = fc.input_quantizer = None
    x = torch.rand(4, 3, 8, 8)
    found = to_onnx(graph_module, weight_type="int4")
    model = onnx.load_model_from_string(found.content)
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    assert kinds["head.weight.values"] == onnx.TensorProto.UINT4
    assert found.layers["fc"] == "simulated"
    assert "fc/QuantizeLinear" not in {node.name for node in model.graph.node}
    off = (run_in_onnxruntime(found.content, x) - exact(graph_module, x)).abs().amax(1)
    assert (off < 1e-5).float().mean() >= 0.5


def test_what_is_refused(small: fxquant.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="no weight type is called 'int2'; there are int8, int4"):
        small.export_onnx(tmp_path / "model.onnx", weight_type="int2")
    with pytest.raises(ArtefactError, match="there is no folder"):
        small.export_onnx(tmp_path / "missing" / "model.onnx")
    if library.why_absent() is None:
        with pytest.raises(ExportError, match="export the model it was lowered from"):
            small.lowered("cpu-native").export_onnx(tmp_path / "model.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fxquant\[onnx\]'"):
        small.export_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_operations_that_torch_cannot_export_are_named() -> None:
    graph_module = quantize_by_hand(SmallNet(), (3, 8, 8), 4, 4)
    output = graph_module.graph.output_node()
    with graph_module.graph.inserting_before(output):
        strange = graph_module.graph.call_function(torch.special.airy_ai, (output.args[0],))
    output.args = (strange,)
    graph_module.recompile()
    with pytest.raises(ExportError, match="airy_ai"):
        to_onnx(graph_module)


def test_a_model_in_float64_is_refused() -> None:
    graph_module = trace(SmallNet().double(), torch.rand(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(ExportError, match=r"float64.*compile model\.float"):
        to_onnx(graph_module)
