"""Backends: what each one runs, what it leaves alone, and what it says where it cannot run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.data import embedded
from fxquant.errors import ArtefactError, BackendError
from fxquant.graph.facts import QUANTIZED
from fxquant.graph.notes import execution_of
from fxquant.graph.printer import format_graph
from fxquant.runtime import simulated
from fxquant.runtime.native import library
from passes.lower.backends import backends
from passes.lower.backends.cuda import BACKEND, MoveToGpu
from passes.lower.lower import Lower, execution_summary, resolved
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from tests.assertions import exact
from tests.lowering import lower, needs_kernels, needs_vnni, note_bits, quantized
from tests.models import embedded_compiled


@pytest.fixture(scope="module")
def compiled() -> fxquant.Compiled:
    return embedded_compiled()


@needs_kernels
def test_embedded_model_agrees_on_the_test_images(compiled: fxquant.Compiled) -> None:
    low = compiled.lowered("cpu-native")
    x = embedded.test_images()[0][:300]
    truth = exact(compiled.graph_module, x)
    with torch.inference_mode():
        found, simulated_scores = low(x), compiled(x)
    # Rounding in float32 moves the simulated scores as much on most images. On some, a value beside a threshold falls
    # on its other side; one that images share, such as of their background, does so on many. Few change class.
    error, simulated_error = ((scores - truth).abs().amax(1) for scores in (found, simulated_scores))
    assert error.median() < 1.5 * simulated_error.median()
    assert error.max() < 1.0
    assert (found.argmax(1) != truth.argmax(1)).sum() <= 3


@needs_kernels
def test_loading_lowered(compiled: fxquant.Compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "model.fxq")
    low = fxquant.load(tmp_path / "model.fxq", backend="auto")
    x = embedded.test_images()[0][:5]
    with torch.inference_mode():
        assert torch.equal(low(x), compiled.lowered()(x))
    assert {row.execution.split()[0] for row in low.layers} == {"convolution", "linear", "attention"}
    assert {row.execution for row in compiled.layers} == {"simulated"}
    assert "execution   integer: 38 of 38 layers" in str(low.report())
    with pytest.raises(ArtefactError, match="save the model it was lowered from"):
        low.save(tmp_path / "lowered.fxq")
    # Packed weights and what the layouts need besides: far below the simulated model's float weights and codes.
    layouts = sum(b.numel() for name, b in low.graph_module.named_buffers() if name.endswith("layout"))
    packed = sum(row.weight_bytes for row in low.layers if row.weight_bits)
    assert packed < layouts < 1.8 * packed  # rows of 96 numbers are short: scales and biases weigh


@needs_vnni
def test_onednn_runs_the_linear_layers(compiled: fxquant.Compiled) -> None:
    low = compiled.lowered("cpu-onednn")
    x = embedded.test_images()[0][:100]
    with torch.inference_mode():
        found, expected = low(x), compiled(x)
    assert {row.execution for row in low.layers} == {"simulated", "linear onednn"}
    assert (found - expected).abs().amax(1).median() < 1e-4
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(low)(x), found)


def move_to(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's int8 products run on a CPU too, so all but the place can be tested there."""
    steps = tuple(replace(step, device=device) if isinstance(step, MoveToGpu) else step for step in BACKEND.pipeline)
    there = replace(BACKEND, pipeline=steps, why_absent=lambda: None)
    monkeypatch.setitem(backends(), BACKEND.name, there)


def test_cuda_runs_the_linear_layers(compiled: fxquant.Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        move_to("cpu", monkeypatch)
    low = compiled.lowered("cuda")
    assert {row.execution for row in low.layers} == {"simulated", "linear cuda"}
    for x in (embedded.test_images()[0][:100], embedded.test_images()[0][:1]):
        with torch.inference_mode():
            found, expected = low(x), compiled(x)
        assert found.device == x.device
        assert (found - expected).abs().amax(1).median() < 1e-4
    again = Pipeline([Lower("cuda")], assumes=[QUANTIZED]).run(low.graph_module, PassContext())
    assert format_graph(again) == format_graph(low.graph_module)


def test_cuda_leaves_models_alone_that_have_nothing_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    move_to("meta", monkeypatch)
    graph_module = quantized("vit")
    for module in graph_module.modules():
        if isinstance(module, simulated.QuantizedLinear):
            module.input_quantizer = None
    note_bits(graph_module)
    low = lower(graph_module, "cuda")
    assert {str(parameter.device) for parameter in low.state_dict().values()} == {"cpu"}


def test_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="no backend is called 'gpu'; there are auto, cpu-native"):
        Lower("gpu")
    monkeypatch.setattr(library, "found", lambda: "no compiler was found")
    with pytest.raises(BackendError, match="no compiler"):
        lower(quantized("vit"), "cpu-native")
    with pytest.warns(UserWarning, match="backend 'auto' is .* here: no compiler was found"):
        assert resolved("auto") in ("cpu-onednn", "simulated")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.warns(UserWarning, match="'simulated' here"):
        assert resolved("auto") == "simulated"
    with pytest.raises(BackendError, match="AVX512-VNNI"):
        resolved("cpu-onednn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="GPU"):
        resolved("cuda")
    graph_module = quantized("vit")
    low = lower(graph_module, "auto")
    assert set(execution_of(low).values()) == {"simulated"}
    assert execution_summary(execution_of(low)) == "simulated"
