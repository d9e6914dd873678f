"""What users of Python and torch expect of a call and of a model: progress, a short repr, a log, type hints."""

from __future__ import annotations

import copy
import io
import logging
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fxquant
from fxquant.data.images import ImageData
from fxquant.errors import ArtefactError, BackendError, ModelError, OptionError, StateError
from fxquant.measure.accuracy import evaluate
from fxquant.measure.layer_times import layer_times
from fxquant.measure.timing import measure
from fxquant.report.progress import RichProgress, bars_for, quiet
from fxquant.session.compiled import Compiled
from fxquant.session.tensor_figures import figure_of_layers
from tests.models import compiled, images, vit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> Compiled:
    return compiled("vit", "W4A4")


def test_bars_are_drawn_when_asked_for_and_never_when_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert bars_for(False) is None
    own = RichProgress(Console(file=io.StringIO()))
    assert bars_for(own) is None
    assert quiet(own) is own
    assert quiet(True) is quiet(False) is quiet(None) is None
    for wanted, is_seen in ((True, True), (None, False)):
        bars = bars_for(wanted)
        assert bars is not None
        with bars:
            bars.track("a step", 3).advance()
        assert ("a step" in capsys.readouterr().err) == is_seen


class Steps:
    """A reporter that keeps how much of each step is missing, and which still run."""

    def __init__(self) -> None:
        self.missing: dict[str, int] = {}
        self.running: list[str] = []

    def track(self, label: str, total: int) -> Step:
        self.missing[label] = total
        self.running.append(label)
        return Step(self, label)


@dataclass
class Step:
    steps: Steps
    label: str

    def advance(self, units: int = 1) -> None:
        self.steps.missing[self.label] -= units

    def close(self) -> None:
        self.steps.running.remove(self.label)


def test_every_step_that_begins_is_told_to_its_end(tmp_path: Path) -> None:
    steps, model, pictures = Steps(), vit(depth=1), images(2)
    found = fxquant.compile(model, "W4A4", calibration=pictures, recipe="naive_min_max", progress=steps)
    figure_of_layers(fxquant.Session(model, pictures, recipe="mptq_vit", progress=steps), tmp_path / "layers.svg", 4)
    measure({"it": found}, pictures, seconds=1.0, progress=steps)
    evaluate(found, ImageData("images", 2, lambda index: pictures[index], torch.zeros(2).long(), 7), progress=steps)
    layer_times(found.graph_module, steps)
    assert {"tracing the model", "passes", "calibrating", "quantizing single layers", "timing batches of 2",
            "evaluating", "timing kernels"} <= set(steps.missing)  # fmt: skip
    assert steps.running == []
    assert set(steps.missing.values()) <= {0}, steps.missing


@pytest.mark.parametrize("wanted", [True, False])
def test_calls_on_their_own_draw_bars(wanted: bool, capsys: pytest.CaptureFixture[str]) -> None:
    fxquant.synthesize(vit(depth=1), fxquant.Synthesis(count=1, steps=1), progress=wanted)
    assert ("synthesising 1 images" in capsys.readouterr().err) == wanted


def test_a_progress_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="progress"):
        fxquant.Session(vit(), images(2), progress="loud")  # type: ignore[arg-type]


def test_a_model_shows_itself_in_a_line_and_in_a_notebook_as_a_table(model: Compiled) -> None:
    line = repr(model)
    assert line.startswith("fxquant.Compiled(")
    assert "\n" not in line
    assert "mean weight bits 4.000" in line
    assert len(line) < 400
    shown = copy.copy(model)
    shown.card = {**model.card, "model": "<script>"}
    assert "&lt;script&gt;" in shown._repr_html_()
    assert "<script>" not in shown._repr_html_()


def test_every_pass_is_logged_and_nothing_is_printed_unless_asked_for(
    caplog: pytest.LogCaptureFixture, model: Compiled
) -> None:
    with caplog.at_level(logging.INFO, logger="fxquant"):
        model.lowered("cpu-native")
    assert any(message.startswith("Lower(") for message in caplog.messages)
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("fxquant").handlers)


def test_a_model_can_be_saved_by_torch(model: Compiled, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(images(2)), model(images(2)))


@pytest.mark.parametrize("kind", ["compiled", "loaded", "lowered"])
def test_dtypes_devices_copies_and_states_are_as_in_torch_or_refused(
    kind: str, model: Compiled, tmp_path: Path
) -> None:
    if kind == "loaded":
        model.save(tmp_path / "m.fxq")
    one = {"compiled": lambda: model, "loaded": lambda: fxquant.load(tmp_path / "m.fxq"),
           "lowered": lambda: model.lowered("cpu-native")}[kind]()  # fmt: skip
    wanted = one(images(2))
    for change in (Compiled.half, Compiled.double, Compiled.bfloat16, lambda it: it.to(torch.float64)):
        with pytest.raises(ModelError, match="as it was compiled"):
            change(one)
    with pytest.raises(BackendError, match="meta, where tensors have no values"):
        one.to("meta")
    for same in (one.float(), one.cpu(), one.to("cpu"), one.eval(), one.train()):
        assert same is one
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):  # torch's own words
            one.cuda()
    assert torch.equal(copy.deepcopy(one)(images(2)), wanted)
    assert torch.equal(one(images(2)), wanted), "what was refused changes nothing"
    if kind == "lowered":
        with pytest.raises(StateError, match="lowered"):
            one.state_dict()
        with pytest.raises(ArtefactError, match="lowered"):
            torch.save(one, tmp_path / "m.pt")
    else:
        copied = copy.deepcopy(one)
        copied.load_state_dict(one.state_dict())
        assert torch.equal(copied(images(2)), wanted)


@pytest.mark.quick
def test_type_checkers_see_the_packages_and_a_users_script() -> None:
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert "tests/session/user_script.py" in checked
    for package in ("fxquant", "passes", "allocators"):
        assert package in checked
        assert (ROOT / package / "py.typed").is_file()
