"""The command line under torchrun: it speaks and writes once, and refuses what has nothing to share out."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fxquant.cli import app
from fxquant.session.compiled import load
from tests import ranks_at_work as work
from tests.ranks_at_work import on_ranks


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_compile_speaks_and_writes_once(tmp_path: Path, port: int) -> None:
    out = tmp_path / "model.fxq"
    arguments = "compile", "embedded", "W8A8", "--images", "2", "--recipe", "naive_min_max", "--no-cache", "--bits", "8"
    first, second = on_ranks(2, tmp_path, work.run_command, tmp_path, port, *arguments, "--out", str(out))
    assert (first[0], second) == (0, (0, "", ""))
    assert "W8A8" in first[1]
    assert f"{out}: " in first[2]
    assert load(out).card["distributed"] == {"ranks": 2}


def test_images_are_made_once(tmp_path: Path, port: int) -> None:
    made = "synthesize", "embedded", "--count", "2", "--steps", "1", "--batch-size", "1", "--no-cache"
    alone, shared = tmp_path / "alone.npz", tmp_path / "shared.npz"
    assert CliRunner().invoke(app, [*made, "--out", str(alone)]).exit_code == 0
    first, second = on_ranks(2, tmp_path, work.run_command, tmp_path, port, *made, "--out", str(shared))
    assert (first[0], second) == (0, (0, "", ""))
    assert first[2].count("shared.npz") == 1
    assert np.array_equal(np.load(shared)["images"], np.load(alone)["images"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("doctor",), "torchrun has started 2 ranks, and doctor has nothing to share out"),
        (("compile", "embedded", "W0A0"), "mean_weight_bits must be finite and positive"),
    ],
)
def test_errors_are_said_once(arguments: tuple[str, ...], message: str, tmp_path: Path, port: int) -> None:
    first, second = on_ranks(2, tmp_path, work.run_command, tmp_path, port, *arguments)
    assert (first[0], second) == (2, (2, "", ""))
    assert message in first[2]
    assert first[2].count("error: ") == 1
