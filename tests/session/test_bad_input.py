"""What cannot be compiled is refused before any work, and the error says what to do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import (
    BudgetError,
    CalibrationError,
    FxQuantError,
    InfeasibleBudgetError,
    ModelError,
    OptionError,
    OverrideError,
    PipelineError,
    TraceError,
)
from fxquant.session.compiled import Compiled
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes import mptq_vit
from passes.search.calibrate import Calibrate
from passes.substitute.substitute_quantizers import SubstituteQuantizers
from tests.models import images, vit


def with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] = float("nan")  # type: ignore[index,union-attr]
    return model


def pixel(value: float) -> Tensor:
    x = images(4)
    x[2, 1, 3, 3] = value
    return x


class Unsized(nn.Module):
    """Says nothing of its images' size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


def quantized_by_torch() -> nn.Module:
    model = vit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what it quantizes with
        model.head = torch.ao.nn.quantized.dynamic.Linear(24, 7)  # type: ignore[assignment]
    return model


BAD_INPUTS: dict[str, tuple[dict[str, Any], type[FxQuantError], str]] = {
    "no images": ({"calibration": images(0)}, CalibrationError, "0 calibration images"),
    "uint8 images": (
        {"calibration": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)},
        CalibrationError,
        "convert to float",
    ),
    "NaN in an image": ({"calibration": pixel(float("nan"))}, CalibrationError, "image 2 has NaN"),
    "infinite pixel": ({"calibration": pixel(float("inf"))}, CalibrationError, "image 2 has NaN or infinite"),
    "one image without a batch": ({"calibration": images(1)[0]}, CalibrationError, "N, C, H, W"),
    "a list": ({"calibration": [1, 2]}, CalibrationError, "item 0 is a int"),
    "nothing, and no image size": ({"model": Unsized(), "calibration": None}, CalibrationError, "image_shape="),
    "wrong size": ({"calibration": images(4, 48)}, CalibrationError, "32"),
    "wrong channels": ({"calibration": images(4, 32, 1)}, CalibrationError, "3"),
    "double images, float model": ({"calibration": images(4).double()}, CalibrationError, "float64"),
    "batch size": ({"batch_size": 0}, CalibrationError, "batch_size"),
    "recipe": ({"recipe": "mptq"}, PipelineError, "mptq_vit"),
    "pipeline and options": ({"recipe": mptq_vit(4), "overrides": {"head": 8}}, PipelineError, "brings its own"),
    "pipeline without quantizers": (
        {"budget": None, "recipe": mptq_vit(4).without(SubstituteQuantizers)},
        PipelineError,
        "SubstituteQuantizers()",
    ),
    "a list of passes": ({"recipe": [FoldSqb()]}, PipelineError, "recipe must be text or a Pipeline"),
    "allocator by name": ({"allocator": "greedy"}, BudgetError, "must be an Allocator"),
    "overrides as a list": ({"overrides": ["head"]}, OverrideError, "must be a mapping"),
    "half a batch": ({"batch_size": 2.5}, CalibrationError, "whole"),
    "budget": ({"budget": "four bits"}, BudgetError, "four bits"),
    "budget 0": ({"budget": 0}, BudgetError, ""),
    "infeasible": ({"budget": "W1A4"}, InfeasibleBudgetError, "minimum reachable"),
    "infeasible bytes": ({"budget": "10B"}, InfeasibleBudgetError, "minimum reachable"),
    "infeasible by an override": ({"overrides": {"*": 8}}, InfeasibleBudgetError, "pinned"),
    "override": ({"overrides": {"blocks.9.mlp.fc1": 8}}, OverrideError, "blocks.1.mlp.fc1"),
    "override bits": ({"overrides": {"head": 11}}, OverrideError, "11"),
    "NaN weight": ({"model": with_nan(vit())}, ModelError, "blocks.1.mlp.fc1.weight"),
    "bfloat16": ({"model": vit().bfloat16(), "calibration": images(4).bfloat16()}, ModelError, "model.float()"),
    "float16, no images": ({"model": vit().half(), "calibration": None}, ModelError, "model.float()"),
    "quantized by torch": ({"model": quantized_by_torch()}, ModelError, "quantized already"),
    "no model": ({"model": "vit"}, ModelError, "str"),
    "no parameters": ({"model": nn.ReLU()}, ModelError, "no parameters"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_before_any_calibration(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> int:
        raise AssertionError("calibration has begun")

    monkeypatch.setattr(Calibrate, "apply", unreachable)
    monkeypatch.setattr(FoldSqb, "apply", unreachable)
    changes, error, text = BAD_INPUTS[case]
    arguments = {"model": vit(), "budget": "W4A4", "calibration": images(4)} | changes
    model, budget = arguments.pop("model"), arguments.pop("budget")
    with pytest.raises(error) as caught:
        fxquant.compile(model, budget, **arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize("calibration", [images(4), None], ids=["images", "no images"])
def test_a_quantized_model_is_refused(small: Compiled, tmp_path: Path, calibration: Tensor | None) -> None:
    small.save(tmp_path / "small.fxq")
    for model in (small, small.graph_module, fxquant.load(tmp_path / "small.fxq"), nn.Sequential(small)):
        with pytest.raises(ModelError, match="quantized already: give the float model"):
            fxquant.compile(model, 8, calibration=calibration)


class Tokens(nn.Module):
    """Gives a value of its head at every place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).flatten(2).transpose(1, 2))


def test_output_without_class_scores_is_held_to_its_features_and_the_report_says_so() -> None:
    quantized = fxquant.compile(Tokens(), 4, calibration=images(4))
    assert quantized.card["objective"] == {"name": "features", "unit": "relative squared error per image"}
    assert "features, in relative squared error per image" in str(quantized.report())
    close = fxquant.compile(Tokens(), 8, calibration=images(4))
    x = images(8)[4:]
    errors = [float((each(x) - Tokens()(x)).detach().square().sum()) for each in (quantized, close)]
    assert errors[1] < errors[0] / 20


def test_class_scores_asked_of_another_output_say_what_to_do() -> None:
    with pytest.raises(CalibrationError, match=r'needs class scores.*objective="features"'):
        fxquant.compile(Tokens(), 8, calibration=images(4), objective="classes")
    with pytest.raises(CalibrationError, match=r"vectors.*an output has shape"):
        fxquant.compile(Tokens(), 8, calibration=images(4), objective="embeddings")
    with pytest.raises(OptionError, match="'auto', 'classes', 'features', 'embeddings'"):
        fxquant.compile(Tokens(), 8, calibration=images(4), objective="tokens")


def test_data_dependent_code_is_a_trace_error() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))

    with pytest.raises(TraceError, match="test_bad_input"):
        fxquant.compile(Decides(), 8, calibration=images(4))
