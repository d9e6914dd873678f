"""The backend "onnxruntime": the same values, every layer on bytes, and its errors; files written for it."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import BackendError, MissingExtraError
from fxquant.export.onnx_file import to_onnx
from fxquant.export.onnxruntime_model import OnnxruntimeModel, results_of, session_of
from tests.assertions import exact
from tests.models import images, vit
from tests.quantized_by_hand import quantize_by_hand

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def simulated() -> fxquant.Compiled:
    return fxquant.compile(vit(depth=1), "W4A6", calibration=images(), backend="onnxruntime", progress=None)


@pytest.fixture(scope="module")
def lowered(simulated: fxquant.Compiled) -> fxquant.Compiled:
    return simulated.lowered("onnxruntime")


def test_every_layer_runs_on_bytes_and_gives_what_the_simulated_one_does(
    simulated: fxquant.Compiled, lowered: fxquant.Compiled
) -> None:
    kernels = {row.layer: row.execution for row in lowered.layers}
    assert kernels["patch_embed.proj"] == kernels["head"] == kernels["blocks.0.mlp.fc2"] == "linear onnxruntime"
    assert kernels["blocks.0.attn.qk"] == kernels["blocks.0.attn.av"] == "matmul onnxruntime"
    assert "simulated" not in kernels.values()
    x = images(8, seed=5)
    truth = exact(simulated.graph_module, x)
    off, scale = (lowered(x) - truth).abs().amax(1), truth.abs().max()
    assert (off < 4e-6 * scale).float().mean() >= 0.5  # the others have a code beside a threshold
    assert off.max() < 0.1 * scale
    assert torch.equal(copy.deepcopy(lowered)(x), lowered(x))


def test_what_is_refused(
    simulated: fxquant.Compiled, lowered: fxquant.Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = lowered.graph_module.get_submodule("onnxruntime_model")
    with pytest.raises(BackendError, match=r"images are torch\.float64"):
        module(images(1).double())
    with pytest.raises(BackendError, match="ONNX Runtime cannot read the model"):
        OnnxruntimeModel(b"nothing").session()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fxquant\[onnxruntime\]'"):
        simulated.lowered("onnxruntime")


class Patches(nn.Module):
    """Windows side by side that do not cover the image, then a plain convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.plain = nn.Conv2d(3, 4, (3, 2), stride=(3, 2)), nn.Conv2d(4, 5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(nn.functional.gelu(self.patches(x))).mean((2, 3))


def test_patches_are_a_product_with_the_values_of_the_convolution() -> None:
    graph_module = quantize_by_hand(Patches(), (3, 8, 9), 4, 8)
    x = torch.rand(4, 3, 8, 9)
    written = {runtime: to_onnx(graph_module, runtime=runtime).content for runtime in ("any", "onnxruntime")}
    found = {runtime: results_of(session_of(content), x) for runtime, content in written.items()}
    torch.testing.assert_close(found["onnxruntime"], found["any"], rtol=0, atol=1e-4)
    kernels = OnnxruntimeModel(written["onnxruntime"]).kernels()
    assert kernels == {"patches": "linear onnxruntime"}
    assert OnnxruntimeModel(written["any"]).kernels() == {}
