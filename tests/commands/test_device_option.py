"""`--device`: commands run where it says, and write the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fxquant
from fxquant.cli import app
from fxquant.commands.doctor import examined
from tests.stand_in_device import stand_in

HERE = ("--recipe", "naive_min_max", "--images", "2", "--no-cache", "--bits", "4,8")


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("few_blocks")
def test_commands_run_on_the_device_and_files_do_not_say_so(tmp_path: Path) -> None:
    device, paths = str(stand_in()), [tmp_path / "here.fxq", tmp_path / "there.fxq"]
    for path, name in zip(paths, ("cpu", device), strict=True):
        printed("compile", "embedded", "W4A8", *HERE, "--device", name, "--out", str(path))
    here, there = (fxquant.load(path).state_dict() for path in paths)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    found = [printed("evaluate", str(paths[0]), "--limit", "8", "--device", name, "--json") for name in ("cpu", device)]
    assert json.loads(found[0]) == json.loads(found[1])
    made = ("--count", "1", "--steps", "1", "--no-cache", "--out", str(tmp_path / "images.npz"))
    printed("synthesize", "embedded", *made, "--device", device)
    assert (tmp_path / "images.npz").exists()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", ""])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", "embedded", "--device", name])
    assert result.exit_code == 2
    assert "there are cpu" in " ".join(result.stderr.split())
    assert result.stderr.count("\n") == 1


@pytest.mark.quick
def test_the_doctor_lists_devices() -> None:
    assert examined()["devices"]["cpu"] == "the processor"
