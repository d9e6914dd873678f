"""Rows of a published table on the command line: with options of their recipes, and the commands that measure them."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxquant.reproduction.published import Row, Table


def with_options(rows: tuple[Row, ...], texts: list[str]) -> tuple[Row, ...]:
    """Rows whose recipes have these options, wherever they take them.

    Raises PipelineError for texts that are no options, OptionError for an option that no row takes.
    """
    from dataclasses import replace

    from fxquant.errors import OptionError
    from passes.recipes.written import with_texts

    taken: set[str] = set()
    found = []
    for row in rows:
        recipe, fitting = row.method.recipe, option_texts(row, texts)
        taken.update(fitting)
        changed = None if recipe is None else with_texts(recipe, fitting)
        found.append(replace(row, method=replace(row.method, recipe=changed)))
    if left := [each for each in texts if each not in taken]:
        raise OptionError(f"no recipe of these rows takes the option {left[0]!r}: leave it out, or choose other --rows")
    return tuple(found)


def option_texts(row: Row, texts: list[str]) -> list[str]:
    """Those of some options, name=value, that a row's recipe takes."""
    from passes.recipes.written import own_options

    recipe = row.method.recipe
    own = [] if recipe is None or not recipe.base else own_options(recipe.base)
    return [each for each in texts if each.partition("=")[0] in own]


def command(table: Table, row: Row, model: str, images: int | None, same: dict[str, Any], here: dict[str, Any]) -> str:
    """The command that measures one row alone: `fxquant sweep` where that can, which shows the recipe's own options.

    Args:
        table: that the row stands in.
        row: with a recipe.
        model: as the command line takes it.
        images: how many calibration images; None: the method's own number.
        same: further options by name; those that are None are left out.
        here: likewise, those that `fxquant reproduce` has and `fxquant sweep` has not.
    """
    from json import dumps

    recipe = row.method.recipe
    is_seen_here = here.get("--backend") is not None or here.get("--seeds") is not None
    words = ["fxquant", "sweep", model, "--budgets", row.budget]
    if recipe is None or not recipe.base or row.method.made_images or is_seen_here:
        words = ["fxquant", "reproduce", table.name, model, "--rows", f"{row.method.name} {row.budget}"]
        same = same | here
    else:
        words += ["--recipe", recipe.base]
        for name, value in recipe.options.items():
            words += ["--option", f"{name}={value if isinstance(value, str) else dumps(value)}"]
        words += ["--fully-quantized"] if table.options.get("fully_quantized") else []
        for name, bits in table.options.get("overrides", {}).items():
            words += ["--override", f"{name}={bits}"]
        images = images or row.method.images
    words += [] if images is None else ["--images", str(images)]
    for name, value in same.items():
        for each in value if isinstance(value, list) else [value]:
            words += [] if each is None else [name, str(each)]
    return shlex.join(words)
