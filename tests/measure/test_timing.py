"""Timing in turns, and what it is used on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fxquant
from fxquant.cli import app
from fxquant.data import embedded
from fxquant.data.preprocessing import EMBEDDED
from fxquant.errors import DataError
from fxquant.measure.timing import bfloat16_variant, float_graph, measure


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latency") / "model.fxq"
    card = {"model": "embedded", "preprocessing": EMBEDDED.to_dict()}
    options = {"recipe": "naive_min_max", "calibration": embedded.calibration_images(2), "card": card}
    fxquant.compile(embedded.load_model(), "W8A8", **options).save(path)
    return path


@pytest.mark.quick
def test_every_round_runs_every_variant_in_order() -> None:
    order = []
    variants = {name: lambda x, name=name: order.append((name, torch.get_num_threads())) or x for name in "ab"}
    before = torch.get_num_threads()
    timings = measure(variants, torch.zeros(4, 1, 2, 2), threads=2, seconds=0)
    assert order == [("a", 2), ("b", 2)] * 4  # once to warm up, three rounds
    assert torch.get_num_threads() == before
    assert [(t.variant, t.batch_size, t.threads, t.rounds) for t in timings] == [("a", 4, 2, 3), ("b", 4, 2, 3)]
    assert timings[0].speedup == 1
    assert timings[1].images_per_second == pytest.approx(4000 / timings[1].latency_ms)


def test_slower_variants_have_lower_speedups() -> None:
    x, small = torch.randn(1, 1, 600, 600), torch.randn(1, 1, 8, 8)
    timings = measure({"fast": lambda _: small @ small, "slow": lambda _: x @ x}, x, seconds=0.1)
    assert timings[1].speedup < 0.5
    assert timings[1].cpu_speedup < 0.5


@pytest.mark.quick
def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(DataError, match="0 variants on 1 threads"):
        measure({}, torch.zeros(1, 1, 2, 2))
    with pytest.raises(DataError, match="0 threads"):
        measure({"a": lambda x: x}, torch.zeros(1, 1, 2, 2), threads=0)


def test_the_float_graph_is_the_model_with_rounded_weights(artefact: Path) -> None:
    compiled, x = fxquant.load(artefact), embedded.test_images()[0][:20]
    reference = float_graph(compiled.graph_module)
    with torch.inference_mode():
        expected = embedded.load_model()(x)
        found, half = reference(x), bfloat16_variant(reference)(x)
        assert not torch.equal(compiled(x), found)  # the artefact's own graph keeps its quantizers
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert half.dtype == torch.bfloat16
    assert (half.float() - found).abs().max() < 0.1 * expected.abs().max()


def test_benchmark_command(artefact: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "speed.svg"
    options = ["benchmark", str(artefact), "--batch-size", "2", "--seconds", "0", "--plot", str(plot)]
    text = CliRunner().invoke(app, options)
    assert text.exit_code == 0, text.output
    assert "float32" in text.stdout
    assert "images/s" in text.stdout
    assert plot.read_text().startswith("<?xml")
    result = json.loads(CliRunner().invoke(app, [*options, "--json", "--backend", "simulated"]).stdout)
    assert [t["variant"] for t in result["timings"]] == ["float32", "bfloat16", "simulated"]
    assert result["execution"] == {"simulated": "simulated"}
    wrong = CliRunner().invoke(app, [*options, "--backend", "gpu"])
    assert wrong.exit_code == 2
    assert "no backend is called 'gpu'" in wrong.stderr


def test_evaluate_command_takes_a_backend(artefact: Path) -> None:
    found = {}
    for backend in ("simulated", "auto"):
        options = ["evaluate", str(artefact), "--limit", "200", "--backend", backend, "--json"]
        found[backend] = json.loads(CliRunner().invoke(app, options).stdout)
    assert found["simulated"]["top1"] > 80
    assert abs(found["auto"]["correct"] - found["simulated"]["correct"]) <= 1
