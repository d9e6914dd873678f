"""Published tables as data, and their rows measured on a small model."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from fxquant.artefact.cache import signature
from fxquant.cli import app
from fxquant.commands.compiling import Compiling
from fxquant.commands.table_rows import command
from fxquant.errors import OptionError, PipelineError
from fxquant.measure.accuracy import Accuracy
from fxquant.reproduction.published import Method, Row, Table, methods, published, tables
from fxquant.reproduction.reproduce import reproduce, wanted_rows
from fxquant.session.sweep import Results
from passes.recipes.written import WrittenRecipe
from tests.commands.test_json import jsonschema, schemas
from tests.models import images, vit
from tests.ranks_at_work import on_ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "papers.md"
runner = CliRunner()


@pytest.mark.quick
@pytest.mark.parametrize("name", tables())
def test_every_row_is_a_pipeline_or_says_why_it_is_absent(name: str) -> None:
    table = published(name)
    for row in table.rows:
        assert row.top1
        assert all(0 <= value < table.float_top1[model] + 1 for model, value in row.top1.items())
        if row.method.recipe is None:
            assert row.method.absent
        else:
            assert row.method.differs
            row.method.recipe(row.budget, **table.options)


@pytest.mark.quick
def test_every_method_stands_in_a_table() -> None:
    assert {row.method.name for name in tables() for row in published(name).rows} == set(methods())


@pytest.mark.quick
def test_numbers_are_the_papers() -> None:
    assert published("mptq-vit-1").rows[-1].top1["DeiT-T"] == 55.62
    assert published("mptq-vit-3").rows[-1].top1["Swin-B"] == 44.17
    assert {row.budget: row.top1["DeiT-S"] for row in published("lampq-3").rows if row.method.name == "LampQ"} == {
        "W4": 75.40, "W3": 45.38
    }  # fmt: skip
    mixed = {f"{row.method.name} {row.budget}": row.top1 for row in published("mix-qvit-s1").rows}
    assert (mixed["Mix-QViT MP4"]["ViT-B"], mixed["FIMA-Q W3A3"]["DeiT-T"]) == (83.11, 55.55)
    assert "DeiT-S" not in mixed["Ranking-ViT W6A6"] or mixed["Ranking-ViT W6A6"]["DeiT-S"] == 74.58
    assert "ViT-S" not in mixed["Ranking-ViT W6A6"]


@pytest.mark.quick
def test_columns_go_by_the_papers_names_and_by_timms() -> None:
    table = published("mptq-vit-2")
    assert (table.column("DeiT-S"), table.column("swin_base_patch4_window7_224")) == ("DeiT-S", "Swin-B")
    assert table.column("deit_small_patch16_224.fb_in1k") == "DeiT-S"
    assert table.column("deit_tiny_patch16_224") is None
    with pytest.raises(OptionError, match="there are lampq-3"):
        published("lampq-2")
    with pytest.raises(OptionError, match="its methods are Baseline, SQ"):
        wanted_rows(table, ["Nobody"])
    with pytest.raises(OptionError, match="called Nobody; its methods"):
        wanted_rows(table, ["SQ-b", "Nobody"])


def baseline_on_ranks(rank: int) -> dict[str, Any]:
    """The float model's accuracy, which only the first of two ranks knows before."""

    def measure(model: nn.Module, label: str) -> Accuracy:
        raise AssertionError(f"{label} is known")

    results = Results()
    if rank == 0:
        results.point(signature("", "float32"), lambda: {"accuracy": {"top1": 90.0}})
    table = published("mptq-vit-1")
    return reproduce(table, nn.Identity(), lambda *_: images(2), measure, results, rows=(), column=None)[0]


def test_ranks_share_what_one_of_them_has_measured(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path, baseline_on_ranks) == [{"top1": 90.0}] * 2


@pytest.mark.quick
def test_a_whole_name_and_budget_is_one_row() -> None:
    table = published("lampq-5")
    for row in table.rows:
        assert wanted_rows(table, [f"{row.method.name} {row.budget}"]) == (row,)
    assert len(wanted_rows(table, ["LampQ", "VT-PTQ on PSAQ-ViT W4A8"])) == 3
    assert wanted_rows(table) == table.rows


@pytest.mark.quick
@pytest.mark.parametrize("name", tables())
def test_the_commands_of_a_table_are_read_as_its_rows(name: str) -> None:
    table, group = published(name), get_command(app)
    assert isinstance(group, TyperGroup)
    for row in table.rows:
        if row.method.recipe is None:
            continue
        _, verb, *words = shlex.split(command(table, row, "embedded", 4, {}, {}))
        given = group.commands[verb].make_context(verb, words).params
        if verb == "sweep":
            names = [field.name for field in dataclasses.fields(Compiling)]
            options = Compiling(**{name: given[name] for name in names}).options(recipe=given["recipe"])
            found = options["recipe"]
            assert (WrittenRecipe(found) if isinstance(found, str) else found) == row.method.recipe
            assert {key: options[key] for key in ("fully_quantized", "overrides") if options[key]} == table.options
            assert (given["budgets"], given["images"]) == (row.budget, 4)
        else:
            assert wanted_rows(table, given["rows"]) == (row,)


@pytest.mark.quick
def test_a_command_measures_what_the_row_did() -> None:
    made, plain = published("lampq-5").rows[0], published("mptq-vit-1").rows[-1]
    same, here = {"--synthesis-steps": 500}, {"--seeds": None, "--backend": None, "--option": ["fold=x"]}
    text = command(published("lampq-5"), made, "m", None, same, here)
    assert text.startswith("fxquant reproduce lampq-5 m --rows 'PSAQ-ViT W4A8' --synthesis-steps 500")
    assert "--option fold=x" in text
    assert command(published("mptq-vit-1"), plain, "m", 8, {}, here).startswith("fxquant sweep m --budgets W4A4 ")
    for option in ({"--seeds": 3}, {"--backend": "cpu-native"}):
        text = command(published("mptq-vit-1"), plain, "m", 8, {}, here | option)
        assert text.startswith("fxquant reproduce mptq-vit-1 m --rows 'SQ-b+OPT-m W4A4' --images 8")
        assert all(f"{name} {value}" in text for name, value in option.items())


@pytest.mark.quick
def test_the_page_says_of_every_method_what_differs_or_why_it_is_absent() -> None:
    text = PAGE.read_text()
    for name, method in methods().items():
        recipe = method.recipe
        what = "absent" if recipe is None else f"`{recipe.base}`" if recipe.base else "a list of passes"
        assert f"| {name} | {what}" in text, name
        assert f"| {method.differs or method.absent} |" in text, name


def small_table() -> Table:
    method = Method("naive", WrittenRecipe("naive_min_max"), images=2)
    rows = (Row(method, "W8A8", {"DeiT-T": 70.0}), Row(method, "W4A4", {}), Row(Method("no", absent="why"), "W4A4", {}))
    return Table("t", "title", "source", {"DeiT-T": 72.0}, rows)


def test_rows_are_measured_once_for_each_seed_and_kept(tmp_path: Path) -> None:
    table, asked, measured = small_table(), [], []

    def calibration(method: Method, seed: int) -> Any:
        asked.append((method.images, seed))
        return images(method.images, seed=seed)

    def measure(model: nn.Module, label: str) -> Accuracy:
        measured.append(label)
        return Accuracy({"the float model": 80, "naive at W8A8": 79}.get(label, 60) - len(measured) // 4, 100)

    def run() -> Any:
        given = {"rows": table.rows, "column": "DeiT-T", "seeds": (1, 2), "options": {"bits": (4, 8)}}
        return reproduce(table, vit(depth=1), calibration, measure, Results(tmp_path / "r.json"), **given)

    baseline, done = run()
    assert done[0].drop_error is None, "which images were right is not known"
    assert asked == [(2, 1), (2, 2)], "one session for all budgets"
    assert measured == ["the float model", *["naive at W8A8", "naive at W4A4"] * 2]
    first, second = done
    assert baseline["top1"] == 80
    assert (first.paper, first.paper_drop, first.by_seed) == (70.0, 2.0, (79.0, 78.0))
    assert (first.top1, first.drop, first.gap) == (78.5, 1.5, 0.5)
    assert first.spread == pytest.approx(0.5**0.5)
    assert (second.paper, second.gap) == (None, None)
    assert run()[1] == done
    assert len(measured) == 5, "nothing is measured again"


def test_a_drop_has_its_paired_error(tmp_path: Path) -> None:
    def right(*wrong: int) -> tuple[bool, ...]:
        return tuple(index not in wrong for index in range(100))

    answers = {"the float model": right(*range(20)), "naive at W8A8": right(*range(2, 25)), "naive at W4A4": right()}

    def measure(model: nn.Module, label: str) -> Accuracy:
        found = answers[label]
        return Accuracy(sum(found), len(found), right=found)

    def run() -> Any:
        given = {"rows": table.rows, "column": "DeiT-T", "options": {"bits": (4, 8)}}
        results = Results(tmp_path / "r.json")
        return reproduce(table, vit(depth=1), lambda method, seed: images(2), measure, results, **given)

    table = small_table()
    for _ in range(2):  # measured, and read from the file
        first, second = run()[1]
        assert (first.drop, second.drop) == (3.0, -20.0)
        assert first.drop_error == pytest.approx(100 * ((0.07 - 0.03**2) / 100) ** 0.5)
        assert second.drop_error == pytest.approx(4.0)


@pytest.mark.usefixtures("few_blocks")
def test_the_command_prints_what_the_page_says(tmp_path: Path) -> None:
    given = [
        "reproduce",
        "mptq-vit-1",
        "embedded",
        "--column",
        "DeiT-T",
        "--limit",
        "20",
        "--images",
        "2",
        "--no-cache",
    ]
    rows = ["--rows", "TSPTQ-ViT W4A4", "--rows", "APQ", "--option", "weight_scales=channel", "--seeds", "1"]
    result = runner.invoke(app, [*given, *rows, "--results", str(tmp_path / "r.json"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    jsonschema.validate(found, schemas()["reproduce"])
    (row,) = found["rows"]
    assert (row["method"], row["paper"], row["paper_drop"]) == ("TSPTQ-ViT", 48.36, pytest.approx(72.18 - 48.36))
    assert 0 < row["drop_standard_error"] < 2**0.5 * max(row["standard_error"], found["baseline"]["standard_error"])
    assert row["command"] == (
        "fxquant sweep embedded --budgets W4A4 --recipe tsptq_vit --option weight_scales=channel --images 2 --limit 20"
    )
    assert set(found["absent"]) == {"APQ-ViT"}
    again = runner.invoke(app, [*given, *rows, "--results", str(tmp_path / "r.json")])
    assert "TSPTQ-ViT  W4A4" in again.stdout
    assert "its paper is not at hand" in again.stdout


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--option", "steps=3"], "no recipe of these rows takes"),
        (["--column", "ResNet-50"], "has no column"),
        (["--rows", "ResNet"], "its methods are"),
        (["--backend", "abacus"], "no backend is called"),
        (["--images", "1024"], "512 embedded calibration images"),
        (["--synthesis-steps", "9"], "made from the model: leave --synthesis-steps out"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(options: list[str], message: str) -> None:
    result = runner.invoke(app, ["reproduce", "mptq-vit-1", "embedded", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.quick
def test_an_allocator_with_options_is_written_as_a_table() -> None:
    written = WrittenRecipe("mptq_vit", {"allocator": {"allocator": "greedy", "metric": "sqnr"}})
    (allocate,) = (step for step in written("W4A4") if type(step).__name__ == "AllocateBits")
    assert "metric='sqnr'" in repr(allocate)
    with pytest.raises(PipelineError, match="no option 'speed'"):
        WrittenRecipe("mptq_vit", {"allocator": {"allocator": "greedy", "speed": 1}})("W4A4")
