"""Every command that prints results prints them as JSON too, as docs/reference/json.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fxquant.cli import app
from fxquant.commands.console import to_json
from fxquant.commands.doctor import examined
from fxquant.commands.list_parts import KINDS
from tests.commands.schemas import as_documented, schemas
from tests.models import embedded_compiled

jsonschema = pytest.importorskip("jsonschema")
WRITE_FILES_ONLY = {"report", "plot"}
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
runner = CliRunner()


def check(*arguments: object) -> None:
    """Run a command with --json; what it prints is what the page says."""
    result = runner.invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    as_documented(str(arguments[0]), result.stdout)


@pytest.mark.quick
def test_every_command_takes_json_and_has_a_schema() -> None:
    known = schemas()
    for name, command in COMMANDS.items():
        takes_json = any("--json" in parameter.opts for parameter in command.params)
        assert takes_json == (name not in WRITE_FILES_ONLY), name
        assert takes_json == (name in known), name
    for schema in known.values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", ["list", "doctor"])
def test_what_is_installed_prints_what_the_page_says(name: str) -> None:
    check(name)


def test_commands_on_artefacts_print_what_the_page_says(tmp_path: Path) -> None:
    path = str(tmp_path / "m.fxq")
    compiled = embedded_compiled()
    compiled.save(path)
    as_documented("compile", to_json(compiled.report().to_dict()))
    check("inspect", path, "--graph")
    check("compare", path, path)
    check("evaluate", "embedded", "--limit", 8)


@pytest.mark.quick
def test_a_value_that_is_not_documented_fails() -> None:
    for printed in ("no JSON", "{}", '{"out": "a", "calibration": "b", "shape": [0.5], "seconds": 1}'):
        with pytest.raises((ValueError, jsonschema.ValidationError)):
            as_documented("synthesize", printed)


@pytest.mark.quick
def test_everything_that_is_listed_has_a_line() -> None:
    for kind, rows_of in KINDS.items():
        rows = rows_of()
        assert len(rows) >= 4, kind
        assert all(line and "\n" not in line for line in rows.values()), kind


@pytest.mark.parametrize("width", [60, 80])
def test_lists_are_no_wider_than_the_terminal(width: int) -> None:
    for name in ("list", "doctor"):
        result = runner.invoke(app, [name], env={"COLUMNS": str(width)})
        assert result.exit_code == 0, result.output
        paths = [line for line in result.stdout.splitlines() if len(line) > width and "/" not in line]
        assert not paths, paths


def test_the_doctor_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["no-such-thing>=1; extra == 'more'", "torch"])
    extra = {"name": "more", "installed": False, "missing": ["no-such-thing"], "install": "pip install 'fxquant[more]'"}
    assert examined()["extras"] == [extra]


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "dogs"],
        ["list", "--dogs"],
        ["inspect", "missing.fxq"],
        ["compile", "embedded", "W4A4", "--recipe-file", "missing.toml"],
        ["compile", "embedded", "W4A4", "--option", "base"],
        ["compile", "embedded", "W4A4", "--image-sizes", "28"],
        ["compile", "embedded", "W4A4", "--device", "cuda:99"],
        ["evaluate", "embedded", "--device", "gpu"],
        ["synthesize", "embedded", "--out", "images.npz", "--device", "meta"],
        ["compile", "embedded", "W4A4", "--recipe", "lampq", "--recipe-file", "missing.toml"],
    ],
)
def test_what_is_refused_ends_with_exit_code_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


def test_the_doctor_tells_of_a_cache_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    glob = Path.glob

    def refused(folder: Path, pattern: str) -> object:
        if pattern == "*":
            raise PermissionError("not yours")
        return glob(folder, pattern)

    monkeypatch.setattr(Path, "glob", refused)
    assert examined()["cache"]["writable"] is False
