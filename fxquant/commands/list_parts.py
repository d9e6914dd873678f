"""`fxquant list`: what can be named: recipes, quantizers, allocators, backends, passes, tables; one line each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fxquant.commands.options import Json


def list_parts(
    kind: Annotated[
        str | None,
        typer.Argument(help="recipes, quantizers, allocators, backends, passes or tables; all if not given."),
    ] = None,
    json: Json = False,
) -> None:
    """List everything that has a name, with a line on each."""
    from fxquant.commands.console import emit, show_list
    from fxquant.errors import OptionError

    if kind is not None and kind not in KINDS:
        raise OptionError(f"there is no list of {kind!r}; there are {', '.join(KINDS)}")
    found = {name: KINDS[name]() for name in KINDS if kind in (None, name)}
    if json:
        emit({name: [{"name": each, "summary": line} for each, line in rows.items()] for name, rows in found.items()})
        return
    for index, (name, rows) in enumerate(found.items()):
        show_list(("\n" if index else "") + name.capitalize(), rows)


def line_of(documented: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


def _recipes() -> dict[str, str]:
    from passes.recipes import RECIPES

    return {name: line_of(recipe) for name, recipe in RECIPES.items()}


def _quantizers() -> dict[str, str]:
    from fxquant.quantizers.families import FAMILIES

    return {name: line_of(family.propose) for name, family in FAMILIES.items()}


def _allocators() -> dict[str, str]:
    from allocators import ALLOCATORS, allocator_named

    return {name: line_of(type(allocator_named(name))) for name in ALLOCATORS}


def _backends() -> dict[str, str]:
    from passes.lower.backends import backends

    return {name: backend.summary for name, backend in backends().items()}


def _passes() -> dict[str, str]:
    from passes.recipes.written import pass_class, pass_names

    return {name: line_of(pass_class(name)) for name in pass_names()}


def _tables() -> dict[str, str]:
    from fxquant.reproduction.published import published, tables

    return {name: published(name).title for name in tables()}


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "recipes": _recipes,
    "quantizers": _quantizers,
    "allocators": _allocators,
    "backends": _backends,
    "passes": _passes,
    "tables": _tables,
}
"""What can be listed, and how it is found."""
