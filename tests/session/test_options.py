"""Options: written down once, and given alike in Python and on the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from functools import partial

import pytest
from typer.main import get_command

import fxquant
from fxquant.cli import app
from fxquant.commands.compiling import Compiling
from fxquant.errors import OptionError, PipelineError
from fxquant.session.options import SessionOptions
from fxquant.session.session import Session
from passes.options import RECIPE_NAMES, RecipeOptions, SharedOptions, words
from passes.recipes import RECIPES, naive_min_max
from tests.models import images, vit

WRITTEN_OTHERWISE = {
    "inputs": "input",
    "overrides": "override",
    "latency": "latency_batch",
    "cache": "cache",
    "recipe": "recipe",
}
MADE_BY_THE_COMMAND = {"progress", "card"}


def test_every_option_says_what_it_means() -> None:
    for options in (SharedOptions, RecipeOptions, SessionOptions):
        for name in options.__annotations__:
            assert words(options, name).endswith("."), name


@pytest.mark.parametrize("command", ["compile", "frontier", "sweep"])
def test_every_option_of_the_call_exists_on_the_command_line(command: str) -> None:
    known = {parameter.name for parameter in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    wanted = {WRITTEN_OTHERWISE.get(name, name) for name in SessionOptions.__annotations__} - MADE_BY_THE_COMMAND
    assert wanted <= known
    assert {field.name for field in fields(Compiling)} <= known


def test_the_call_lists_its_options() -> None:
    listed = " ".join(str(fxquant.compile.__doc__).split())
    for name in SessionOptions.__annotations__:
        assert f"{name}: {words(SessionOptions, name)}" in listed


def test_the_command_line_knows_all_names_without_importing_torch() -> None:
    assert tuple(RECIPES) == RECIPE_NAMES
    lines = (
        "import sys, passes.options, fxquant.session.options, fxquant.commands.compiling; print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", lines], text=True).strip() == "False"


def test_a_function_is_a_recipe_and_has_options_of_its_own() -> None:
    model, x = vit(depth=1), images(2)
    found = fxquant.compile(model, 8, calibration=x, recipe=partial(naive_min_max, bits=(8,)))
    assert found.allocation is not None
    assert set(found.allocation.usage) >= {"weight_bytes"}
    with pytest.raises(PipelineError, match="naive_min_max has no option 'typo'"):
        fxquant.Session(model, x, recipe=partial(naive_min_max, typo=1))
    with pytest.raises(PipelineError, match=r"returned 3 .*not a Pipeline"):
        fxquant.Session(model, x, recipe=lambda budget, **options: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(OptionError, match="compile has no option 'update'"):
        fxquant.compile(model, 8, calibration=x, recipe="lampq", update=None)  # type: ignore[call-arg]


def test_a_class_is_no_recipe() -> None:
    with pytest.raises(PipelineError, match="the recipe is the class int"):
        Session(vit(depth=1), images(2), recipe=int)  # type: ignore[arg-type]


def test_fixed_inputs_are_json_values_by_name() -> None:
    assert Compiling(input=["size=3", "mask=null"]).options()["inputs"] == {"size": 3, "mask": None}
    with pytest.raises(OptionError, match="no name=value with a value in JSON"):
        Compiling(input=["size=three"]).options()
