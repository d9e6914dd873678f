"""`torch.export`: simulated and lowered models, saved, loaded, with a free batch; and `torch.compile`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant.runtime.native import library
from tests.models import ARCHITECTURES, compiled, images


@pytest.mark.parametrize("architecture", ["vit", "swin"])
@pytest.mark.parametrize("backend", ["simulated", "cpu-native"])
def test_models_survive_export_saving_and_loading(architecture: str, backend: str, tmp_path: Path) -> None:
    if backend == "cpu-native" and library.why_absent() is not None:
        pytest.skip(str(library.why_absent()))
    model = compiled(architecture).lowered(backend)
    x = images(5, ARCHITECTURES[architecture]()[1], seed=3)
    with torch.inference_mode():
        expected, of_two = model(x), model(x[:2])
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        if backend == "cpu-native":
            calls = {str(node.target) for node in program.graph.nodes if "fxquant" in str(node.target)}
            assert {f"fxquant.{name}.default" for name in ("quantize", "linear", "chain")} <= calls
            assert torch.equal(torch.compile(model.graph_module, backend="aot_eager", fullgraph=True)(x), expected)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        assert torch.equal(loaded(x), expected)
        assert torch.equal(loaded(x[:2]), of_two)
