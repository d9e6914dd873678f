"""`report`, `compare`, `plot`, and `compile --report page.html`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxquant.cli import app
from tests.report.small_pages import small_compiled

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "small.fxq"
    small_compiled().save(path)
    return path


def test_report_writes_the_page_of_a_file(artefact: Path, tmp_path: Path) -> None:
    found = RUNNER.invoke(app, ["report", str(artefact), str(tmp_path / "report.html")])
    assert found.exit_code == 0, found.output
    assert found.stdout == "", "what is no result goes to stderr"
    assert (tmp_path / "report.html").read_text() == small_compiled().report().to_html()


def test_report_with_a_backend_says_kernels_and_times(artefact: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    found = RUNNER.invoke(app, ["report", str(artefact), str(page), "--backend", "auto", "--time"])
    assert found.exit_code == 0, found.output
    text = page.read_text()
    assert "Times of kernels alone: one image, one thread" in text
    assert "the whole model takes" in text
    assert ">simulated<" not in text


def test_compare_writes_both(artefact: Path, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    found = RUNNER.invoke(app, ["compare", str(artefact), str(artefact), "--html", str(page), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["differences"] == []
    assert "The bits of both are alike." in page.read_text()


@pytest.mark.quick
def test_what_cannot_be_read_or_drawn_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.fxq").write_bytes(b"nothing")
    for arguments, text in (
        (["report", str(tmp_path / "no.fxq"), str(tmp_path / "a.html")], "no.fxq"),
        (["plot", "pie", "embedded", str(tmp_path / "a.png")], "there is no plot 'pie'"),
        (["plot", "tensor", "embedded", str(tmp_path / "a.png")], "needs --layer"),
        (["plot", "layers", "embedded", str(tmp_path / "a.png"), "--layer", "head"], "leave --layer out"),
        (["plot", "boxes", "embedded", str(tmp_path / "a.png"), "--source", "soup"], "there is no source 'soup'"),
        (["plot", "boxes", "embedded", str(tmp_path / "a.gif")], "a plot ends in"),
    ):
        found = RUNNER.invoke(app, arguments)
        assert found.exit_code != 0
        assert text in found.output
        assert len(list(tmp_path.iterdir())) == 1
