"""The command line, run in this process: what it prints where, what it writes, how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import fxquant
from allocators.greedy import Greedy
from allocators.problem.budget import Budget
from allocators.uniform import Uniform
from fxquant.artefact.cache import signature
from fxquant.cli import app
from fxquant.commands.inspect_artefact import report_of
from fxquant.commands.options import with_options
from fxquant.commands.texts import parse_overrides
from fxquant.data import embedded
from fxquant.data.preprocessing import Preprocessing
from fxquant.errors import DataError, OverrideError
from fxquant.measure.accuracy import Accuracy
from fxquant.session.session import Session
from fxquant.session.sweep import Results, sweep
from passes.search.search_cache import split
from tests.commands.schemas import as_documented
from tests.models import images, vit

runner = CliRunner()
QUICK = ["--images", "8", "--allocator", "greedy"]


def run(*arguments: object) -> Any:
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An artefact, a report and a picture written by `fxquant compile`, and what it printed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compiled")
    files = ["--out", folder / "m.fxq", "--report", folder / "m.json", "--picture", folder / "m.svg"]
    options = ["--override", "blocks.0.mlp.fc1=6", "--override", "head=8/7", "--first-last-bits", "8"]
    return folder, run("compile", "embedded", "W4A4", *QUICK, *files, *options)


@pytest.mark.quick
def test_version() -> None:
    assert run("--version").stdout == f"fxquant {fxquant.__version__}\n"


@pytest.mark.quick
def test_help_of_every_command() -> None:
    for command in ("demo", "compile", "inspect", "evaluate", "sweep", "synthesize", "frontier", "benchmark", "export"):
        found = run(command, "--help")
        assert found.exit_code == 0, found.output
        assert "--json" in found.stdout


@pytest.mark.quick
def test_help_fits_80_columns_with_no_word_cut() -> None:
    for command in get_command(app).commands:  # type: ignore[attr-defined]
        found = runner.invoke(app, [command, "--help"], env={"COLUMNS": "80"})
        lines = found.stdout.splitlines()
        assert max(map(len, lines)) == 80, command
        assert not [line for line in lines if "…" in line], command


def test_compile(compiled: tuple[Path, Any]) -> None:
    folder, result = compiled
    assert result.exit_code == 0, result.output
    assert "fxquant report" in result.stdout
    assert "m.fxq: 0.4" in result.stderr
    bits = {row["layer"]: row for row in json.loads((folder / "m.json").read_text())["layers"]}
    assert (bits["blocks.0.mlp.fc1"]["weight_bits"], bits["blocks.0.mlp.fc1"]["pinned"]) == (6, True)
    assert (bits["head"]["weight_bits"], bits["head"]["activation_bits"]) == (8, 7)
    assert bits["patch_embed.proj"]["weight_bits"] == 8
    ElementTree.parse(folder / "m.svg")
    card = fxquant.load(folder / "m.fxq").card
    assert card["recipe"] == "best"
    assert card["preprocessing"]["input_size"] == [1, 28, 28]
    assert str(folder) not in json.dumps(card)


def test_a_second_budget_recalls_what_was_searched(tmp_path: Path) -> None:
    common = ["compile", "embedded", "--images", "2", "--allocator", "greedy"]
    first, second = (run(*common, budget, "--cache", tmp_path) for budget in ("W5A5", "W4A4"))
    plain = run(*common, "W4A4", "--no-cache", "--json")
    assert "recalled" not in first.stderr + plain.stderr
    assert f"recalled from {tmp_path}" in second.stderr
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert (
        json.loads(run(*common, "W4A4", "--cache", tmp_path, "--json").stdout)["layers"]
        == (json.loads(plain.stdout)["layers"])
    )


def test_synthesize_and_compile_without_data(tmp_path: Path) -> None:
    out, sheet = tmp_path / "made.npz", tmp_path / "made.png"
    result = run("synthesize", "embedded", "--count", 3, "--steps", 2, "--out", out, "--sheet", sheet, "--json")
    assert result.exit_code == 0, result.output
    assert as_documented("synthesize", result.stdout)["shape"] == [3, 1, 28, 28]
    assert sheet.read_bytes().startswith(b"\x89PNG")
    quick = ["--images", "3", "--allocator", "greedy", "--no-cache", "--json"]
    given = run("compile", "embedded", "W4A4", *quick, "--calibration", out)
    made = run("compile", "embedded", "W4A4", *quick, "--synthesis-steps", "2")
    assert "synthesised (PSAQ-ViT, 3 images, 2 x 2 steps, seed 0)" in made.stderr
    found, same = json.loads(made.stdout), json.loads(given.stdout)
    assert found["card"]["calibration"] == "synthesised (PSAQ-ViT, 3 images, 2 x 2 steps, seed 0)"
    assert (found["card"]["calibration_data"], same["card"]["calibration_data"]) == ("none", "made.npz")
    assert found["totals"]["predicted_loss"] > 0
    assert same["totals"]["predicted_loss"] > 0


def test_inspect_builds_no_model(compiled: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiled[0] / "m.fxq"
    whole = str(fxquant.load(path).report())
    monkeypatch.setattr("fxquant.session.compiled.load", lambda path: pytest.fail("a model was built"))
    assert str(report_of(path)) == whole
    brief, full = run("inspect", path), run("inspect", path, "--layers")
    assert brief.exit_code == full.exit_code == 0
    assert "total bytes" in brief.stdout
    assert "W SQNR dB" not in brief.stdout
    assert "W SQNR dB" in full.stdout


def test_inspect_says_what_is_damaged(compiled: tuple[Path, Any], tmp_path: Path) -> None:
    content = (compiled[0] / "m.fxq").read_bytes()
    assert b"0.353" in content
    (tmp_path / "m.fxq").write_bytes(content.replace(b"0.353", b"0.253"))
    result = run("inspect", tmp_path / "m.fxq")
    assert result.exit_code == 2
    assert "is damaged" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--image-size", "32"], "options of preprocessing"), (["--images", "100000"], "there are 512")],
)
def test_embedded_images_are_as_they_are(arguments: list[str], text: str) -> None:
    result = run("compile", "embedded", "W4A4", *arguments)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.split())


def test_inspect_json_and_graph(compiled: tuple[Path, Any], tmp_path: Path) -> None:
    path = compiled[0] / "m.fxq"
    result = run("inspect", path, "--graph", "--json", "--picture", tmp_path / "m.dot")
    found = json.loads(result.stdout)
    assert {"totals", "layers", "actions", "card", "journal", "sizes", "graph"} <= set(found)
    assert found["sizes"]["total_bytes"] == path.stat().st_size
    assert any("fc1[w6a6]" in line for line in found["graph"])
    assert (tmp_path / "m.dot").read_text().startswith("digraph")
    assert "fc1[w6a6]" in run("inspect", path, "--graph").stdout


def test_evaluate(compiled: tuple[Path, Any], tmp_path: Path) -> None:
    path = compiled[0] / "m.fxq"
    assert "% +/- " in run("evaluate", path, "--limit", 50).stdout
    found = json.loads(run("evaluate", "embedded", "--limit", 50, "--json").stdout)
    assert (found["count"], found["data"]) == (50, "the embedded test images")
    with np.load(embedded.TEST) as data:
        np.savez(tmp_path / "test.npz", images=data["images"][:50], labels=data["labels"][:50])
    same = json.loads(run("evaluate", "embedded", "--data", tmp_path / "test.npz", "--json").stdout)
    images, labels = embedded.test_images(50)
    assert same["correct"] == int((embedded.load_model()(images).argmax(1) == labels).sum())


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = embedded.calibration_images
    monkeypatch.setattr(embedded, "calibration_images", lambda count: whole(min(count, 8)))
    options = ["--limit", 100, "--allocator", "greedy", "--out", tmp_path / "new" / "demo"]
    result = run("demo", *options, "--json")
    assert result.exit_code == 0, result.output
    found = as_documented("demo", result.stdout)
    assert set(found["accuracy"]) == {"float32", "quantized", "as_integers", "naive_min_max"}
    assert found["accuracy"]["quantized"]["top1"] > 80
    assert found["reloaded_identical"]
    assert found["artefact_bytes"] == (tmp_path / "new" / "demo" / "model.fxq").stat().st_size
    ElementTree.parse(tmp_path / "new" / "demo" / "bits.svg")


def test_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, plot = tmp_path / "r.json", tmp_path / "p.png"
    common = ["sweep", "embedded", *QUICK, "--limit", 50, "--results", results]
    first = run(*common, "--budgets", "W8A8,W4A4", "--plot", plot, "--json")
    assert first.exit_code == 0, first.output
    found = as_documented("sweep", first.stdout)
    assert [point["budget"] for point in found["points"]] == ["W8A8", "W4A4"]
    assert found["baseline"]["count"] == 50
    assert plot.stat().st_size > 1000

    monkeypatch.setattr("fxquant.session.session.Session.compile", lambda *_: pytest.fail("a point was computed again"))
    again = run(*common, "--budgets", "W8A8,W4A4", "--json")
    assert json.loads(again.stdout) == found
    table = run(*common, "--budgets", "W4A4").stdout
    assert "float32" in table
    assert "best     greedy     W4A4" in table
    with pytest.raises(BaseException, match="computed again"):
        runner.invoke(app, [str(part) for part in (*common, "--budgets", "W5A5")], catch_exceptions=False)


def test_sweep_calibrates_once_and_equals_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pictures = vit(depth=1), images(4)
    expected = fxquant.compile(model, "W4A4", calibration=pictures, allocator=Greedy(), bits=(3, 4, 8))
    calls = []
    apply = fxquant.Pipeline.run

    def run(pipeline: fxquant.Pipeline, *given: Any, **options: Any) -> Any:
        calls.append(len(pipeline))
        return apply(pipeline, *given, **options)

    monkeypatch.setattr(fxquant.Pipeline, "run", run)
    session = Session(model, pictures, bits=(3, 4, 8))

    def measure(runs: torch.nn.Module, label: str) -> Accuracy:
        return Accuracy(1, 2)

    done = sweep({"best": session}, [Budget.parse(8), Budget.parse(4)], [Greedy(), Uniform()], measure, Results(), "x")
    assert [point["allocator"] for point in done.points] == ["greedy", "uniform"] * 2
    prefix, rest = split(session.pipeline(4))
    assert sorted(calls) == sorted([1, *[len(rest)] * 4, len(prefix)]), "roles, four allocations, one calibration"
    found = session.compile("W4A4", Greedy())
    assert found.allocation == expected.allocation
    assert torch.equal(found(pictures), expected(pictures))
    assert len(found.journal.entries) == len(expected.journal.entries)


def test_signatures_and_results_files(tmp_path: Path) -> None:
    assert signature({"a": 1}, torch.ones(2)) == signature({"a": 1}, torch.ones(2))
    assert signature(torch.ones(2)) != signature(torch.ones(1, 2))
    assert signature(torch.nn.Linear(2, 2)) != signature(torch.nn.Linear(2, 2))
    kept = Results(tmp_path / "r.json")
    assert kept.point("k", lambda: {"x": 1}) == {"x": 1, "signature": "k"}
    assert Results(tmp_path / "r.json").point("k", lambda: pytest.fail("made again")) == {"x": 1, "signature": "k"}
    for content in (b"{", b"[]", b'{"points": [1]}', b"\xff" * 1000):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(DataError, match="holds no sweep results") as refusal:
            Results(tmp_path / "bad.json")
        assert len(str(refusal.value)) < 300, "what is in the file is not all told"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "embedded", "W1A1"], "minimum reachable 2"),
        (["compile", "embedded", "W4X"], "cannot read 'X'"),
        (["compile", "nope", "W4A4"], "no timm model is called 'nope'"),
        (["compile", "embedded", "W4A4", "--recipe", "x"], "no recipe is called 'x'"),
        (["compile", "embedded", "W4A4", "--allocator", "x"], "no allocator is called 'x'"),
        (["compile", "embedded", "W4A4", "--override", "fc1"], "an override reads"),
        (["compile", "embedded", "W4A4", "--backend", "gpu"], "no backend is called 'gpu'"),
        (["compile", "embedded", "W4A4", "--backend", "cpu-native", "--recipe", "adalog"], "'adalog-zero-gelu'"),
        (["compile", "embedded", "W4A4, 5ms"], "needs backend='cpu-native'"),
        (["compile", "embedded", "W4A4", "--override", "nothing*=4"], "matches no layer"),
        (["compile", "embedded", "W4A4", "--out", "missing/m.fxq"], "there is no folder missing"),
        (["compile", "embedded", "W4A4", "--picture", "m.png"], "ends in .svg or .dot"),
        (["compile", "embedded", "W4A4", "--cache", "c", "--no-cache"], "give one of them"),
        (["compile", "embedded", "W4A4", "--cache", "/dev/null/c"], "cannot be made"),
        (["compile", "embedded", "W4A4", "--mean", "a"], "mean must be numbers"),
        (["compile", "embedded", "W4A4", "--calibration", "missing"], "missing does not exist"),
        (["compile", "embedded", "W4A4", "--calibration", "x", "--synthesis-steps", "3"], "give one of them"),
        *(
            (
                [*command, "--recipe", "tsptq_vit", "--option", "weight_scales=channel", "--calibration", "missing"],
                "missing does not exist",  # after the recipe's own option was read
            )
            for command in (
                ["compile", "embedded", "W4A4"],
                ["sweep", "embedded", "--budgets", "W4A4"],
                ["frontier", "embedded"],
            )
        ),
        (["compile", "embedded", "W4A4", "--recipe", "tsptq_vit", "--option", "x=1"], "'tsptq_vit' has no option 'x'"),
        (["frontier", "embedded", "--limits", "4,1"], "minimum reachable 2"),
        (["frontier", "embedded", "--axis", "bits", "--limits", "4"], "runs along one of"),
        (["synthesize", "embedded", "--out", "x.png"], "must end in .npz"),
        (["evaluate", "vit_tiny_patch16_224"], "give labelled images"),
        (["evaluate", "missing.fxq"], "missing.fxq is not there"),
        (["evaluate", "missing.fxq", "--num-classes", "3"], "brings its own weights: leave --num-classes out"),
        (["evaluate", "embedded", "--backend", "auto"], "a float model, and no artefact (.fxq): leave --backend out"),
        (["evaluate", "embedded", "--mean", "0.1"], "or give images with --data"),
        (["inspect", "missing.fxq"], "missing.fxq is not there"),
        (["export", "missing.fxq", "missing.fxq"], "missing.fxq must end in .onnx or .fxm"),
        (["report", "missing.fxq", "report.json"], "report.json must end in .html or .htm"),
        (["compare", "missing.fxq", "missing.fxq", "--html", "missing.fxq"], "must end in .html or .htm"),
        (["sweep", "embedded", "--budgets", "W4A4", "--plot", "p.gif"], "ends in one of"),
        (["sweep", "embedded", "--budgets", "W4A4,W1A1"], "minimum reachable 2"),
        (["demo", "--budget", "none"], "cannot read"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    *_, last = result.stderr.strip().splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_random_weights_are_said_loudly() -> None:
    assert "RANDOM weights" in run("evaluate", "vit_tiny_patch16_224", "--model-option", "depth=1").stderr


def test_overrides_of_the_command_line() -> None:
    texts = ["a=6", "fc2=4/8", "h=8/-", "b=c=3"]
    assert parse_overrides(texts) == {"a": 6, "fc2": (4, 8), "h": (8, None), "b=c": 3}
    for text in ("a", "=4", "a=", "a=x", "a=1/2/3", "a=-", "a=-4"):
        with pytest.raises(OverrideError):
            parse_overrides([text])


def test_options_replace_what_a_model_says_of_its_pictures() -> None:
    said = Preprocessing((3, 16, 16), crop_pct=0.8)
    found = with_options(said, 32, 0.9, "squash", "0.1,0.2,0.3", None, "bilinear")
    assert found == Preprocessing((3, 32, 32), 0.9, (0.1, 0.2, 0.3), said.std, "bilinear", "squash")
    assert with_options(said, None, None, None, None, None, None) == said
