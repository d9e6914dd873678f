"""What users of Python and torch expect of a call and of a model: progress, a short repr, a log, type hints."""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fxquant
from fxquant.errors import OptionError
from fxquant.report.progress import RichProgress, bars_for, quiet
from fxquant.session.compiled import Compiled
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


USER_SCRIPT = """
import torch
import fxquant
from fxquant import Budget, Compiled, Session

def compiled(model: torch.nn.Module, images: torch.Tensor) -> Compiled:
    session = Session(model, images, recipe="best", overrides={"head": 8}, progress=False)
    first: Compiled = session.compile(Budget.parse("W4A4"))
    first.save("model.fxq")
    again: Compiled = fxquant.load("model.fxq", backend="auto")
    report: str = str(again.report())
    print(report, first.allocation)
    return fxquant.compile(model, "W4A4", calibration=images, seed=1, fully_quantized=True)
"""


@pytest.mark.timeout(300)
def test_a_users_script_passes_strict_type_checks(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(USER_SCRIPT)
    bad.write_text(USER_SCRIPT.replace("seed=1", "sede=1"))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
    found = subprocess.run([*command, *cache, str(good), str(bad)], capture_output=True, text=True, cwd=ROOT)
    assert "good.py" not in found.stdout, found.stdout
    assert 'Unexpected keyword argument "sede"' in found.stdout or "sede" in found.stdout, found.stdout + found.stderr
