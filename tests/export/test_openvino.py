"""The backend "openvino": the same values, layers that really run on bytes, and its errors."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import fx, nn
from torch.fx import GraphModule

import fxquant
from fxquant.errors import BackendError, ExportError, MissingExtraError
from fxquant.export.onnx_file import to_onnx
from fxquant.export.openvino_model import OpenvinoModel, reason_of
from fxquant.graph.notes import IMAGE_SHAPE
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedInput
from tests.assertions import exact
from tests.models import ONE_BLOCK, compiled, images

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def simulated() -> fxquant.Compiled:
    return compiled(ONE_BLOCK)


@pytest.fixture(scope="module")
def lowered(simulated: fxquant.Compiled) -> fxquant.Compiled:
    return simulated.lowered("openvino")


def test_openvino_computes_what_we_do(simulated: fxquant.Compiled, lowered: fxquant.Compiled) -> None:
    x = images(8, seed=5)
    truth = exact(simulated.graph_module, x)
    off, scale = (lowered(x) - truth).abs().amax(1), truth.abs().max()
    assert (off < 4e-6 * scale).float().mean() >= 0.5
    assert off.max() < 0.1 * scale
    assert torch.equal(copy.deepcopy(lowered)(x), lowered(x))
    torch.testing.assert_close(lowered(x[:1]), lowered(x)[:1])


def test_layers_on_bytes_are_those_the_file_has_codes_for(lowered: fxquant.Compiled) -> None:
    kernels = {row.layer: row.execution for row in lowered.layers}
    assert kernels["blocks.0.attn.qkv"] == "linear openvino"
    assert kernels["blocks.0.attn.qk"] == "matmul openvino"
    assert kernels["blocks.0.mlp.fc2"] == "simulated"  # OPT-m of 6 bits: its levels span more than a byte
    assert "integer: " in lowered.card["execution"]
    assert lowered.lowered("openvino").card["execution"] == lowered.card["execution"]


def test_the_number_of_threads_follows_torch(lowered: fxquant.Compiled) -> None:
    module = lowered.graph_module.get_submodule("openvino_model")
    assert isinstance(module, OpenvinoModel)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert module.compiled().get_property("INFERENCE_NUM_THREADS") == 2
    finally:
        torch.set_num_threads(before)
    assert module.compiled().get_property("INFERENCE_NUM_THREADS") == before


def test_what_is_refused(
    simulated: fxquant.Compiled, lowered: fxquant.Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match=r"images are torch\.float64"):
        lowered.graph_module.get_submodule("openvino_model")(images(1).double())
    with pytest.raises(BackendError, match="OpenVINO cannot compile the model"):
        OpenvinoModel(b"nothing").compiled()
    if library.why_absent() is None:
        with pytest.raises(ExportError, match="export the model it was lowered from"):
            simulated.lowered("cpu-native").lowered("openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fxquant\[openvino\]'"):
        simulated.lowered("openvino")


def test_a_scale_per_channel_compiles() -> None:
    """The inputs of layer norms have one in fully quantized models; OpenVINO refuses it as QuantizeLinear."""
    quantizer = UniformQuantizer(4, torch.linspace(0.1, 0.5, 12))
    root, graph = nn.Module(), fx.Graph()
    root.add_module("norm", QuantizedInput(nn.LayerNorm(12), quantizer))
    x = graph.call_method("flatten", (graph.placeholder("x"), 1, 2))
    graph.output(graph.call_module("norm", (x,)))
    graph_module = GraphModule(root.eval(), graph).eval()
    IMAGE_SHAPE.write(graph_module, (1, 12, 12))
    x = images(3, 12, channels=1)
    torch.testing.assert_close(OpenvinoModel(to_onnx(graph_module).content)(x), graph_module(x), rtol=1e-5, atol=1e-5)


def test_nan_and_no_images_mean_what_they_do_elsewhere(lowered: fxquant.Compiled) -> None:
    x = images(3)
    expected, bad = lowered(x), x.clone()
    bad[1, 0, 0, 0] = torch.nan
    assert torch.isnan(lowered(bad)).all(1).tolist() == [False, True, False]
    assert torch.equal(lowered(bad)[::2], expected[::2])
    assert lowered(x[:0]).shape == (0, *expected.shape[1:])


def test_the_whole_reason_is_told_in_one_line() -> None:
    error = RuntimeError("Exception from a.cpp:1:\nCheck 'axis' failed at b.cpp:2:\nno such axis\n\n")
    assert reason_of(error) == "Check 'axis' failed at b.cpp:2: no such axis"
