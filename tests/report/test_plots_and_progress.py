"""Plots and progress bars."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fxquant.errors import ArtefactError, MissingExtraError
from fxquant.report.plots import PlotPoint, check_plot, plot_accuracy, plot_sensitivity
from fxquant.report.progress import RichProgress

POINTS = [PlotPoint("milp", 8, 91.0, 0.5), PlotPoint("milp", 4, 90.0, 0.5), PlotPoint("greedy", 4, 88.0)]


def test_plot(tmp_path: Path) -> None:
    plot_accuracy(tmp_path / "a.png", POINTS, 91.5)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    plot_accuracy(tmp_path / "a.svg", POINTS)
    ElementTree.parse(tmp_path / "a.svg")
    with pytest.raises(ArtefactError, match=r"ends in one of \.png"):
        check_plot(tmp_path / "a.gif")


def test_every_line_is_drawn(tmp_path: Path) -> None:
    plot_accuracy(tmp_path / "p.svg", [PlotPoint(f"line {index}", 4, 50) for index in range(40)])
    assert "<!-- line 39 -->" in (tmp_path / "p.svg").read_text()


def test_sensitivity_plot_has_a_panel_a_metric_and_a_line_a_role(tmp_path: Path) -> None:
    layers = [f"blocks.{block}.{role}" for block in range(3) for role in ("qkv", "fc1")]
    roles = {layer: layer.rpartition(".")[2] for layer in layers}
    scores = {layer: float(index) for index, layer in enumerate(layers)}
    plot_sensitivity(tmp_path / "s.svg", {"tr(F)": scores, "alpha tr(F)": {**scores, "blocks.0.fc1": 5.0}}, roles)
    text = ElementTree.tostring(ElementTree.parse(tmp_path / "s.svg").getroot()).decode()
    assert text.count("axes_") >= 2
    assert all(f"<!-- {role} -->" in (tmp_path / "s.svg").read_text() for role in ("qkv", "fc1", "tr(F)"))
    with pytest.raises(ArtefactError, match="a score above zero"):
        plot_sensitivity(tmp_path / "s.svg", {"nothing": dict.fromkeys(layers, 0.0)}, roles)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fxquant\[plots\]'"):
        check_plot("a.png")


def test_progress_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with RichProgress(console) as progress:
        outer, inner = progress.track("calibrating", 2), progress.track("inner", 3)
        outer.advance()
        inner.advance(3)
        inner.close()
        inner.close()
        outer.close()
        progress.track("again", 1).close()
    assert "calibrating" in console.file.getvalue()  # type: ignore[attr-defined]


def test_progress_is_silent_elsewhere() -> None:
    console = Console(file=io.StringIO())
    with RichProgress(console) as progress:
        task = progress.track("calibrating", 2)
        task.advance()
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_an_error_leaves_no_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    progress = RichProgress(console)
    with suppress(ZeroDivisionError), progress:
        progress.track("calibrating", 2)
        raise ZeroDivisionError
    assert "\x1b[?25h" in console.file.getvalue(), "the cursor is back"  # type: ignore[attr-defined]
