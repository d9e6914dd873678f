"""Recipes from data: files and options become the pipelines that Python writes, and everything else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from allocators.greedy import Greedy
from fxquant.errors import DataError, FxQuantError, PipelineError
from passes.allocate.metrics import NuclearNorm
from passes.recipes import RECIPES, lampq, mptq_vit, repq_vit
from passes.recipes.written import WrittenRecipe, own_options, pass_names, read_recipe, with_texts


def written(folder: Path, content: object, name: str = "recipe.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_names_a_recipe_with_options(tmp_path: Path) -> None:
    found = read_recipe(written(tmp_path, {"recipe": "lampq", "options": {"base": "repq_vit", "update": None}}))
    assert found("W4A4", first_last_bits=8) == lampq("W4A4", base=repq_vit, update=None, first_last_bits=8)
    scored = read_recipe(written(tmp_path, {"recipe": "lampq", "options": {"metric": {"metric": "NuclearNorm"}}}))
    assert scored("W4A4") == lampq("W4A4", metric=NuclearNorm())
    greedy = read_recipe(written(tmp_path, 'recipe = "mptq_vit"\n[options]\nallocator = "greedy"', "recipe.toml"))
    assert greedy("W4A4", allocator=None) == mptq_vit("W4A4", allocator=Greedy())


def test_a_file_lists_passes_with_options(tmp_path: Path) -> None:
    text = "\n".join(
        f'[[passes]]\npass = "{name}"\n{more}'
        for name, more in (
            ("AssignRoles", ""), ("PlanOperands", 'post_gelu = "opt-m-below-8"'), ("FoldSqb", ""),
            ("InsertObservers", ""), ("Calibrate", ""),
            ("SearchScales", 'weight_scales = "tensor"'),
            ("AllocateBits", 'allocator = "milp"'), ("SubstituteQuantizers", ""),
        )
    )  # fmt: skip
    assert read_recipe(written(tmp_path, text, "own.toml"))("W4A5") == mptq_vit("W4A5")


def test_options_on_the_command_line_are_json_or_text() -> None:
    assert with_texts("best", []) == "best"
    found = with_texts("lampq", ["base=repq_vit", "update=null", "outside_bits=[8, 6]"])
    assert isinstance(found, WrittenRecipe)
    assert found("W4A4") == lampq("W4A4", base=repq_vit, update=None, outside_bits=(8, 6))


def test_every_recipe_says_which_options_it_has() -> None:
    assert all(own_options(name)[-2:] == ("allocator", "fold") for name in RECIPES)
    assert {"base", "update"} <= set(own_options("lampq"))
    assert len(set(pass_names())) >= 15


@pytest.mark.parametrize(
    "content",
    [
        [], {"recipe": "none"}, {"recipe": "best", "code": "x"}, {"recipe": 3}, {"passes": ["AssignRoles"]}, {},
        {"recipe": "best", "options": {"base": "lampq"}}, {"recipe": "lampq", "options": {"fully_quantized": True}},
        {"passes": [{"pass": "os.system"}]}, {"passes": [{"pass": "AssignRoles"}], "options": {"a": 1}},
    ],
)  # fmt: skip
def test_files_that_are_no_recipes_are_refused_by_name(content: object, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"recipe\.json"):
        read_recipe(written(tmp_path, content))


@pytest.mark.parametrize(
    "found",
    [
        WrittenRecipe("lampq", {"base": "none"}),
        WrittenRecipe("lampq", {"metric": {"metric": "os"}}),
        WrittenRecipe("mptq_vit", {"allocator": "none"}),
        WrittenRecipe(passes=({"pass": "SubstituteQuantizers"},)),
        WrittenRecipe(passes=({"pass": "FoldSqb", "strengths": 1},)),
        WrittenRecipe(passes=({"pass": "FoldSqb", "strength": "much"},)),
        WrittenRecipe(passes=({"pass": "AllocateBits", "budget": "W4"},)),
    ],
)
def test_values_that_do_not_fit_are_refused_before_anything_runs(found: WrittenRecipe) -> None:
    with pytest.raises(FxQuantError):
        found("W4A4")


@pytest.mark.parametrize(
    ("name", "text"), [("r.json", "{"), ("r.toml", "= 1"), ("r.py", "1"), ("r.json", "[" * 100_000)]
)
def test_files_that_cannot_be_read_are_refused(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_recipe(written(tmp_path, text, name))
    with pytest.raises(DataError):
        read_recipe(tmp_path / "missing.json")


@pytest.mark.parametrize("text", ["base", "=3", ""])
def test_options_that_are_no_pairs_are_refused(text: str) -> None:
    with pytest.raises(PipelineError):
        with_texts("lampq", [text])
    with pytest.raises(PipelineError):
        with_texts(WrittenRecipe(passes=({"pass": "AssignRoles"},)), ["a=1"])


def test_values_that_nest_deeper_than_options_do_are_refused(tmp_path: Path) -> None:
    text = '{"passes": [{"pass": "FoldSqb", "strength": ' + '{"a": ' * 900 + "1" + "}" * 900 + "}]}"
    with pytest.raises(PipelineError, match="16 deep"):
        read_recipe(written(tmp_path, text, "r.json"))
