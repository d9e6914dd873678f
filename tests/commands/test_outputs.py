"""Where output cannot be written: one line on stderr and exit code 2, before the work where that can be known."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import fxquant
from fxquant.cli import app
from fxquant.commands.early_checks import check_output
from fxquant.commands.inspect_artefact import report_of
from fxquant.commands.options import cache_folder
from fxquant.errors import DataError
from fxquant.report.sections import Table
from tests.models import images, vit

CASES = textwrap.dedent("""
    import json, os, sys, tempfile
    from fxquant.cli import main

    def run(out, err, *words):
        errors = tempfile.TemporaryFile()
        child = os.fork()
        if child == 0:  # ends as the command would, with what Python writes when it ends
            nowhere = os.open("/dev/full", os.O_WRONLY)
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2({"full": nowhere, "pipe": writer, "none": os.open(os.devnull, os.O_WRONLY)}[out], 1)
            os.dup2(nowhere if err == "full" else errors.fileno(), 2)
            sys.argv = ["fxquant", *words]
            main()
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return code, errors.read().decode()

    file = sys.argv[1]
    print(json.dumps({
        "version": run("full", "", "--version"), "help": run("full", "", "--help"), "pipe": run("pipe", "", "--help"),
        "usage": run("none", "full", "inspect"), "inspect": run("full", "", "inspect", file),
    }))
""")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("outputs") / "m.fxq"
    model = vit(embed_dim=16, depth=1, num_heads=2, img_size=16)
    fxquant.compile(model, "W8A8", calibration=images(2, 16), recipe="naive_min_max").save(file)
    return file


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/dev/full").exists(), reason="needs fork and /dev/full")
def test_streams_that_cannot_be_written(artefact: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CASES, str(artefact)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for case in ("version", "help", "inspect"):
        code, errors = found[case]
        assert code == 2
        assert errors.startswith("error: output cannot be written")
        assert errors.count("\n") == 1
    assert found["pipe"] == [1, ""], "a reader that has gone ends the command quietly"
    assert found["usage"][0] == 2, "a stderr that is full changes nothing"
    assert "Traceback" not in done.stderr


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "m.fxq")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "good").symlink_to(tmp_path / "m.fxq")
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "folder", "is a folder"),
        (tmp_path / "pipe", "no regular file"),
        (Path("/dev/null"), "no regular file"),
        (tmp_path / "link", "there is no folder"),
        (tmp_path / "circle", "circle"),
        (tmp_path / ("x" * 300), "cannot be written"),
        (Path("/proc/m.fxq"), "cannot be written"),
    ):
        with pytest.raises(DataError, match=message):
            check_output(path)
    with pytest.raises(DataError, match="two outputs"):
        check_output(tmp_path / "m.fxq", None, tmp_path / "good")
    check_output(tmp_path / "m.fxq", tmp_path / "report.json", None)
    assert {file.name for file in tmp_path.iterdir()} == {"folder", "link", "circle", "good", "pipe"}


def test_without_a_home_the_command_line_warns_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder(None, no_cache=False) is None
    result = CliRunner().invoke(app, ["compile", "embedded", "W1A1"])
    assert result.exit_code == 2
    assert "warning" in result.stderr
    assert "minimum reachable" in result.stderr


INTERRUPTED = """
import signal
from fxquant.cli import app
from fxquant.commands import doctor
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
doctor.examined = lambda *_: signal.raise_signal(signal.SIGINT)
app(["doctor"])
"""


def test_ctrl_c_is_one_line_and_exit_code_130() -> None:
    """In a process of its own: an interrupt that comes late would end this one."""
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("width", [60, 80])
def test_a_report_on_a_terminal_is_broken_and_loses_nothing(artefact: Path, width: int) -> None:
    report = report_of(artefact)
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(report)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    drawn = "".join(text.split())
    for section in report.sections():
        if isinstance(section, Table):
            found = [*section.columns, *(cell.text for row in section.rows for cell in row)]
        else:
            found = [line for _, line in section.lines]
        assert all("".join(line.split()) in drawn for line in found), section.title
