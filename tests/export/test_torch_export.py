"""`torch.export`: simulated and lowered models, saved, loaded, with a free batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant.runtime.native import library
from tests.export.runtimes import compiled
from tests.lowering import lower, needs_kernels, quantized
from tests.models import ARCHITECTURES, images


@pytest.mark.parametrize("architecture", ["vit", "swin"])
@pytest.mark.parametrize("backend", ["simulated", "cpu-native"])
def test_models_survive_export_saving_and_loading(architecture: str, backend: str, tmp_path: Path) -> None:
    if backend == "cpu-native" and library.why_absent() is not None:
        pytest.skip(str(library.why_absent()))
    model = compiled(architecture).lowered(backend)
    x = images(5, ARCHITECTURES[architecture]()[1], seed=3)
    with torch.inference_mode():
        expected = model(x)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        assert torch.equal(loaded(x), expected)
        assert torch.equal(loaded(x[:2]), model(x[:2]))


@needs_kernels
@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_lowered_graphs_compile_and_export(architecture: str) -> None:
    low, x = lower(quantized(architecture), chains=True), images(3)
    with torch.inference_mode():
        expected = low(x)
    with torch.no_grad():
        exported = torch.export.export(low, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        assert torch.equal(exported.module()(x[:2]), expected[:2])
        calls = {str(node.target) for node in exported.graph.nodes if "fxquant" in str(node.target)}
        assert {f"fxquant.{name}.default" for name in ("quantize", "linear", "chain")} <= calls
        compiled = torch.compile(low, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
