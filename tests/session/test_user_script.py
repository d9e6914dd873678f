"""A user's script under pyright, where it is installed; mypy checks it with the packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("user_script.py")
IGNORE = "  # type: ignore[call-arg]"


def test_pyright_finds_the_misspelt_option_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    text = SCRIPT.read_text()
    line = next(number for number, found in enumerate(text.splitlines()) if IGNORE in found)
    (tmp_path / "script.py").write_text(f"# pyright: strict\n{text.replace(IGNORE, '')}")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")], capture_output=True, text=True, cwd=SCRIPT.parents[2], check=False
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert [(each["rule"], each["range"]["start"]["line"]) for each in found] == [("reportCallIssue", line + 1)], found
