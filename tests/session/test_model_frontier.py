from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxquant
from fxquant.cli import app
from fxquant.errors import BudgetError, CalibrationError
from fxquant.session.model_frontier import Frontier
from tests.commands.schemas import as_documented
from tests.models import images, vit

FEW = {"bits": (2, 3, 4, 8)}


@pytest.fixture(scope="module")
def found() -> Frontier:
    return fxquant.frontier(vit(depth=1), images(3), limits=[3, 3.5, 4, 8], realised="divergence", **FEW)


def test_points_are_what_compile_gives(found: Frontier) -> None:
    assert [point.limit for point in found.points] == [3, 3.5, 4, 8]
    model, x = vit(depth=1), images(3)
    compiled = fxquant.compile(model, 3, calibration=x)
    assert compiled.allocation is not None
    assert all(point.allocation.status == "optimal" for point in found.points)
    prepared = fxquant.frontier(model, x, limits=[3], realised=lambda compiled: float(compiled(x).sum()), **FEW)
    point = prepared.points[0]
    assert point.allocation == found.points[0].allocation
    assert point.loss >= compiled.allocation.objective * (1 - 1e-3), "more widths can only help"


def test_realised_losses_are_measured_on_the_compiled_models(found: Frontier) -> None:
    model, x = vit(depth=1).eval(), images(3)
    assert len(found.realised) == len(found.points)
    assert found.realised[-1] < found.realised[0]
    expected = model(x).detach().double().softmax(1)

    def by_hand(compiled: nn.Module) -> float:
        return float((expected * (expected.log() - compiled(x).double().log_softmax(1))).sum() / 3)

    compiled = fxquant.frontier(model, x, limits=[3], realised=by_hand, **FEW)
    assert compiled.realised_name == "by_hand"
    assert compiled.realised[0] == pytest.approx(found.realised[0], rel=1e-6)


def test_the_model_keeps_its_mode() -> None:
    model = vit(depth=1).train()
    fxquant.frontier(model, images(2), limits=[8], realised="divergence", exact=False, bits=(4, 8))
    assert model.training


def test_table_json_and_plot(found: Frontier, tmp_path: Path) -> None:
    text = str(found)
    assert "Frontier over mean bits" in text
    assert "realised divergence" in text
    assert "+0.1 bits saves" in text
    values = json.loads(json.dumps(found.to_dict()))
    assert [point["limit"] for point in values["points"]] == [3, 3.5, 4, 8]
    assert values["points"][0]["gain"] == values["points"][1]["price"] > 0
    assert values["points"][-1]["gain"] is None
    found.plot(tmp_path / "f.svg")
    assert (tmp_path / "f.svg").stat().st_size > 1000


@pytest.mark.parametrize("axis", ["weight_bytes", "bit_operations"])
def test_the_fast_frontier_needs_no_solver(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allocators.milp.Milp.allocate", lambda *_: pytest.fail("the solver ran"))
    fast = fxquant.frontier(vit(depth=1), images(2), axis=axis, exact=False, **FEW)
    losses = [point.loss for point in fast.points]
    assert len(losses) > 5
    assert losses == sorted(losses, reverse=True)
    assert {point.allocation.solver for point in fast.points} == {"hull"}
    assert ("MB" if axis == "weight_bytes" else "GBOPs") in str(fast)


def test_overrides_hold_everywhere() -> None:
    pinned = fxquant.frontier(vit(depth=1), images(2), limits=[4, 6], exact=False, overrides={"fc1": 8}, **FEW)
    assert {point.allocation.weight_bits["blocks.0.mlp.fc1"] for point in pinned.points} == {8}


def test_command(tmp_path: Path) -> None:
    arguments = ["frontier", "embedded", "--images", "2", "--limits", "4,6", "--fast", "--cache", str(tmp_path)]
    first, again = (CliRunner().invoke(app, [*arguments, *more]) for more in ([], ["--json"]))
    assert first.exit_code == 0, first.output
    assert "Frontier over mean bits" in first.stdout
    assert [point["limit"] for point in as_documented("frontier", again.stdout)["points"]] == [4, 6]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize(("options", "text"), [({"limits": []}, "empty"), ({"realised": "foo"}, "'divergence'")])
def test_options_of_no_use_are_refused_at_once(options: dict[str, object], text: str) -> None:
    with pytest.raises(BudgetError, match=text):
        fxquant.frontier(vit(depth=1), images(3), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("measured", "text"),
    [(images(2, 48), r"shape \(2, 3, 48, 48\).*resize"), (images(2).double(), "are torch.float64")],
)
def test_images_that_the_model_does_not_take_are_refused_before_anything_is_solved(
    measured: torch.Tensor, text: str
) -> None:
    options: dict[str, Any] = {"recipe": "naive_min_max", "bits": (4, 8), "realised": "divergence"}
    with pytest.raises(CalibrationError, match=text):
        fxquant.frontier(vit(depth=1), images(2), limits=[4], images=measured, **options)


def test_outputs_that_are_no_class_scores_have_the_divergence_of_their_features() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x).flatten(2).transpose(1, 2))

    options: dict[str, Any] = {"recipe": "naive_min_max", "realised": "divergence", "bits": (4, 8)}
    model, x = Tokens(), images(2, 16)
    found = fxquant.frontier(model, x, limits=[4, 8], **options)
    assert found.unit == "relative squared error per image"
    assert 0 < found.realised[1] < found.realised[0] < 1
    with pytest.raises(CalibrationError, match="the realised divergence needs class scores"):
        fxquant.frontier(model, x, limits=[8], objective="classes", **options)


class _Scaled(nn.Module):
    """A model with a second argument and a part that stays in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.frozen = vit(depth=1), nn.Dropout(0.5).eval()

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.frozen(self.body(x)) * scale


def test_what_is_realised_is_measured_against_the_model_with_its_fixed_inputs() -> None:
    model = _Scaled().train()
    model.frozen.eval()
    found = fxquant.frontier(
        model,
        images(3),
        limits=[8],
        realised="divergence",
        recipe="naive_min_max",
        inputs={"scale": 2.0},
        bits=(4, 8),
    )
    assert found.realised[0] < 0.1
    assert model.training, "the caller's model keeps its modes"
    assert not model.frozen.training, "of every part"
