"""Recipes from data: a recipe's name with options, or a list of passes with options, as JSON or TOML. No code runs.

    {"recipe": "lampq", "options": {"base": "repq_vit", "update": null}}

    [[passes]]                          # or, in TOML, pass by pass
    pass = "AssignRoles"
    [[passes]]
    pass = "PlanOperands"
    post_gelu = "opt-m"

Values are numbers, texts, true and false, null, and lists. A text is the name of a recipe where the option is `base`,
and of an allocator where it is `allocator`; a table with the key `pass` is a pass, one with the key `metric` a score of
`passes.allocate.metrics`, one with the key `allocator` an allocator with options. Names are looked up among ours:
nothing that a file says is imported or executed. Options that every call takes (`overrides`, `bits`, `backend`, ...)
are not written here, since the call gives them.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Unpack, overload

from allocators import allocator_named
from fxquant.checks.arguments import shown
from fxquant.errors import DataError, PipelineError
from passes.allocate import metrics
from passes.allocate.allocate_bits import AllocateBits
from passes.options import RecipeOptions, SharedOptions
from passes.pipeline.pipeline import Pipeline
from passes.recipes import RECIPES, recipe
from passes.recipes.assembly import with_options

ROOMS = ("prepare", "search", "allocate", "correct", "substitute")
"""Rooms whose passes a file can name; those that lower are chosen by a backend."""

_MOST_BYTES = 1_000_000
_DEEPEST = 16  # tables and lists in each other; options of passes take three or four


@dataclass(frozen=True)
class WrittenRecipe:
    """A recipe as data, called like all others.

    Args:
        base: the name of a recipe; "" where passes are listed.
        options: of that recipe, by name.
        passes: in order, each with its name as `pass` and its options.

    Raises PipelineError for unknown names and options.
    """

    base: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    passes: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        """Raise PipelineError for unknown names and options, before anything runs."""
        _check_depth([self.options, self.passes])
        if bool(self.base) == bool(self.passes):
            raise PipelineError("a written recipe has the name of a recipe or a list of passes, and not both")
        if self.base:
            known = own_options(self.base)
            for name in self.options:
                if name not in known:
                    where = "; give it to the call itself" if name in SharedOptions.__annotations__ else ""
                    raise PipelineError(
                        f"the recipe {self.base!r} has no option {name!r}{where}; it has {', '.join(known)}"
                    )
        elif self.options:
            raise PipelineError("options go with the name of a recipe; passes have theirs beside their names")
        for written in self.passes:
            pass_class(written.get("pass"))

    def __call__(self, budget: Any, **given: Unpack[RecipeOptions]) -> Pipeline:
        """The pipeline for a budget, with the options of the call."""
        if self.base:
            values = {name: _value(value, name) for name, value in self.options.items()}
            # An allocator of None is what a call passes on where nobody chose one.
            more = {name: value for name, value in given.items() if name != "allocator" or value is not None}
            return recipe(self.base)(budget, **{**values, **more})
        return with_options(given, [_pass(written, budget) for written in self.passes])


def _check_depth(level: Sequence[Any]) -> None:
    """Raise PipelineError for values that nest deeper than any option does, before something recurses into them."""
    for _ in range(_DEEPEST):
        inner = [value for value in level if isinstance(value, Mapping | list | tuple)]
        level = [item for value in inner for item in (value.values() if isinstance(value, Mapping) else value)]
        if not level:
            return
    raise PipelineError(f"the recipe nests tables and lists more than {_DEEPEST} deep; no pass takes such an option")


def own_options(name: str) -> tuple[str, ...]:
    """Options that a recipe has besides those of every call. Raises PipelineError for an unknown recipe."""
    parameters = inspect.signature(recipe(name)).parameters.values()
    keywords = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    every = [option for option in RecipeOptions.__annotations__ if option not in SharedOptions.__annotations__]
    return (*keywords, *every)


def read_recipe(path: str | PathLike[str]) -> WrittenRecipe:
    """The recipe of a .json or .toml file. Raises DataError where it cannot be read, PipelineError for what it says."""
    file = Path(path)
    if file.suffix.lower() not in (".json", ".toml"):
        raise DataError(f"{file}: a recipe is written as .json or .toml")
    try:
        with file.open("rb") as opened:
            content = opened.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise DataError(f"{file} has more than {_MOST_BYTES:,} bytes, which no recipe needs")
        found = (json.loads if file.suffix.lower() == ".json" else tomllib.loads)(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as a recipe: {error}") from error
    try:
        return _of_values(found)
    except PipelineError as error:
        raise PipelineError(f"{file}: {error}") from error


def _of_values(found: Any) -> WrittenRecipe:
    if not isinstance(found, dict) or not found.keys() <= {"recipe", "options", "passes"}:
        raise PipelineError('a recipe is a table with the keys "recipe" and "options", or with the key "passes"')
    name, options, passes = found.get("recipe", ""), found.get("options", {}), found.get("passes", [])
    if not isinstance(name, str) or not isinstance(options, dict) or not isinstance(passes, list):
        raise PipelineError('"recipe" is a text, "options" a table, "passes" a list of tables')
    if not all(isinstance(written, dict) for written in passes):
        raise PipelineError('every one of "passes" is a table with its name as "pass"')
    return WrittenRecipe(name, options, tuple(passes))


@overload
def with_texts(base: WrittenRecipe, texts: Sequence[str]) -> WrittenRecipe: ...
@overload
def with_texts(base: str, texts: Sequence[str]) -> str | WrittenRecipe: ...
def with_texts(base: str | WrittenRecipe, texts: Sequence[str]) -> str | WrittenRecipe:
    """A recipe with options as `name=value`, the value as JSON or plain text. Raises PipelineError.

    base: a recipe's name, or what `read_recipe` gave.
    """
    if not texts:
        return base
    if isinstance(base, WrittenRecipe) and not base.base:
        raise PipelineError("the recipe lists its passes, whose options stand beside their names: change them there")
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise PipelineError(f"an option of a recipe reads name=value, such as base=repq_vit; found {text!r}")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    if isinstance(base, WrittenRecipe):
        return WrittenRecipe(base.base, {**base.options, **found})
    return WrittenRecipe(base, found)


def pass_names() -> Iterator[str]:
    """Names of all passes that a file can name, in the order of their rooms."""
    for room in ROOMS:
        package = importlib.import_module(f"passes.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            name = "".join(part.capitalize() for part in module.name.split("_"))
            found = getattr(importlib.import_module(f"passes.{room}.{module.name}"), name, None)
            if dataclasses.is_dataclass(found) and hasattr(found, "apply"):
                yield name


def pass_class(name: Any) -> Any:
    """The pass of this name. Raises PipelineError for another, listing all."""
    if isinstance(name, str) and name in (known := tuple(pass_names())):
        module = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        for room in ROOMS:
            if importlib.util.find_spec(f"passes.{room}.{module}") is not None:
                return getattr(importlib.import_module(f"passes.{room}.{module}"), name)
    known = tuple(pass_names())
    raise PipelineError(f"no pass is called {shown(name)}; there are {', '.join(known)}")


def _pass(written: Mapping[str, Any], budget: Any = None) -> Any:
    kind = pass_class(written.get("pass"))
    fields = {name: _value(value, name) for name, value in written.items() if name != "pass"}
    if kind is AllocateBits:
        if "budget" in fields:
            raise PipelineError("AllocateBits gets its budget from the call: leave it out")
        fields["budget"] = budget
    return _made(kind, fields)


def _made(kind: Any, fields: Mapping[str, Any]) -> Any:
    known = {own.name: own for own in dataclasses.fields(kind) if own.init}
    if unknown := [name for name in fields if name not in known]:
        raise PipelineError(f"{kind.__name__} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    needed = [
        own.name
        for own in known.values()
        if own.default is dataclasses.MISSING and own.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in fields]:
        raise PipelineError(f"{kind.__name__} needs the option {missing[0]!r}")
    return kind(**fields)


def _value(value: Any, name: str) -> Any:
    """A value of the file as Python takes it."""
    if isinstance(value, list):
        return tuple(_value(item, "") for item in value)
    if isinstance(value, Mapping):
        if "pass" in value:
            return _pass(value)
        if "allocator" in value:
            chosen = allocator_named(value["allocator"])
            return _made(type(chosen), {key: _value(item, key) for key, item in value.items() if key != "allocator"})
        if "metric" in value:
            kind = getattr(metrics, str(value["metric"]), None)
            if not dataclasses.is_dataclass(kind) or not hasattr(kind, "score"):
                raise PipelineError(f"no metric is called {shown(value['metric'])}; see passes.allocate.metrics")
            return _made(kind, {key: _value(item, key) for key, item in value.items() if key != "metric"})
        return {key: _value(item, key) for key, item in value.items()}
    if isinstance(value, str) and name == "base":
        return RECIPES[value] if value in RECIPES else recipe(value)
    if isinstance(value, str) and name == "allocator":
        return allocator_named(value)
    return value
