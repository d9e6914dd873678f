"""Tables of MPTQ-ViT, LampQ and Mix-QViT as data: `tables/*.toml` has their numbers, `methods.json` what rows are here.

    table = published("mptq-vit-1")
    for row in table.rows:
        row.method, row.budget, row.top1["DeiT-T"]

A method is a recipe with options, or a list of passes, as `passes.recipes.written` reads them; with the number of
calibration images that its paper has, and what differs from that paper. Or it is absent, with the reason. Left out are
tables of detectors on COCO (MPTQ-ViT's 4, LampQ's 4, Mix-QViT's 2): only top-1 accuracy is measured here.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from fxquant.checks.arguments import text
from fxquant.errors import OptionError
from passes.recipes.written import WrittenRecipe

ARCHITECTURES = {
    "ViT-S": "vit_small_patch16_224",
    "ViT-B": "vit_base_patch16_224",
    "ViT-L": "vit_large_patch16_224",
    "DeiT-T": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "Swin-S": "swin_small_patch4_window7_224",
    "Swin-B": "swin_base_patch4_window7_224",
}
"""timm's names of the models in the tables."""


@dataclass(frozen=True)
class Method:
    """A method of the tables.

    Args:
        name: as the tables call it.
        recipe: what it is here; None where it is absent.
        images: how many calibration images its paper takes.
        made_images: whether these are made from the model alone.
        differs: what differs from its paper.
        absent: why it is not here; "" where it is.
    """

    name: str
    recipe: WrittenRecipe | None = None
    images: int = 32
    made_images: bool = False
    differs: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Args:
        method: what was measured.
        budget: as `Budget.parse` reads it; "W4" where the paper limits weights alone.
        top1: what the paper says, percent, by its name of the model.
    """

    method: Method
    budget: str
    top1: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Args:
        name: as the command line takes it.
        title, source: what it shows, and where it stands.
        float_top1: of the float models, percent, by the paper's names.
        rows: in the paper's order.
        options: of every row, as `fxquant.compile` takes them.
    """

    name: str
    title: str
    source: str
    float_top1: Mapping[str, float]
    rows: tuple[Row, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def column(self, model: str) -> str | None:
        """The paper's name of a model, given that or timm's; None for one that the table does not have.

        What stands behind a point in timm's name says which weights are meant, and not which architecture.
        """
        names = (model, model.partition(".")[0])
        return next((own for own in self.float_top1 if own == model or ARCHITECTURES[own] in names), None)


def _texts() -> Any:
    return importlib.resources.files("fxquant.reproduction")


@cache
def tables() -> tuple[str, ...]:
    """Names of all tables."""
    return tuple(sorted(each.name.removesuffix(".toml") for each in (_texts() / "tables").iterdir()))


@cache
def methods() -> dict[str, Method]:
    """All methods by name."""
    return {name: _method(name, given) for name, given in json.loads((_texts() / "methods.json").read_text()).items()}


def _method(name: str, given: Mapping[str, Any]) -> Method:
    rest = {key: value for key, value in given.items() if key not in ("recipe", "options", "passes")}
    if "absent" in given:
        return Method(name, **rest)
    recipe = WrittenRecipe(given.get("recipe", ""), given.get("options", {}), tuple(given.get("passes", ())))
    return Method(name, recipe, **rest)


@cache
def published(name: str) -> Table:
    """The table of this name. Raises OptionError for another, listing all."""
    if text("table", name, OptionError) not in tables():
        raise OptionError(f"there is no table {name!r}; there are {', '.join(tables())}")
    found = tomllib.loads((_texts() / "tables" / f"{name}.toml").read_text())
    models = found.pop("models")
    rows = []
    for entry in found.pop("methods"):
        for budget, values in entry["top1"].items():
            known = {model: value for model, value in zip(models, values, strict=True) if not math.isnan(value)}
            rows.append(Row(methods()[entry["name"]], budget, known))
    floats = dict(zip(models, found.pop("float"), strict=True))
    return Table(name, found.pop("title"), found.pop("source"), floats, tuple(rows), found)
