"""`fxquant export`, and the backend "openvino" on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxquant.cli import app
from tests.commands.schemas import as_documented
from tests.lowering import needs_kernels
from tests.models import ONE_BLOCK, compiled

pytest.importorskip("onnxscript")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.fxq"
    compiled(ONE_BLOCK).save(path)
    return path


def test_export(artefact: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    found = as_documented("export", run("export", artefact, out, "--json").stdout)
    assert found["bytes"] == out.stat().st_size
    assert found["layers"]["blocks.0.attn.qkv"] == "int8"
    shown = run("export", artefact, out, "--weight-type", "int4").stdout
    assert "7 of 8 layers as int8; the others by float operators" in shown.replace("\n", " ")
    assert out.stat().st_size < found["bytes"] - 10_000


@needs_kernels
def test_a_program_for_the_c_library(artefact: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.fxm"
    found = as_documented("export", run("export", artefact, out, "--json").stdout)
    assert found == {"program": str(out), "bytes": out.stat().st_size}
    refused = run("export", artefact, out, "--weight-type", "int4")
    assert refused.exit_code == 2
    assert "--weight-type, --runtime and --check are for ONNX" in refused.stderr.replace("\n", " ")


def test_failures_are_one_line(artefact: Path, tmp_path: Path) -> None:
    for options, message in (
        ([tmp_path / "none" / "m.onnx"], "there is no folder"),
        ([tmp_path / "m.onnx", "--weight-type", "int3"], "no weight type is called 'int3'"),
    ):
        found = run("export", artefact, *options)
        assert found.exit_code == 2
        assert message in found.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_openvino_is_timed_beside_float(artefact: Path) -> None:
    pytest.importorskip("openvino")
    options = ["--backend", "openvino", "--batch-size", 2, "--seconds", 0, "--json"]
    found = as_documented("benchmark", run("benchmark", artefact, *options).stdout)
    assert "matmul openvino" in found["execution"]["openvino"]
    assert [timing["variant"] for timing in found["timings"]] == ["float32", "bfloat16", "openvino"]
