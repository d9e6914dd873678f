"""Two compiled models side by side: totals, and the layers whose bits differ.

    print(Comparison(report_a, report_b))          # or .to_html(), .to_dict()

Models may differ in anything; layers are matched by name, and those that one of them lacks are listed as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxquant.checks.hints import checked
from fxquant.errors import OptionError
from fxquant.report import html_page
from fxquant.report.grid import Tile, tiles_of
from fxquant.report.render import Document
from fxquant.report.sections import Cell, Lines, Table
from fxquant.report.tables import Report

_TOTALS = (
    ("model MB", "model_bytes", 1e6), ("quantized weights MB", "weight_bytes", 1e6),
    ("mean weight bits", "mean_weight_bits", 1), ("mean activation bits", "mean_activation_bits", 1),
    ("bit operations G", "bit_operations", 1e9), ("predicted loss", "predicted_loss", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A layer that is not alike in both models.

    Args:
        layer: its name.
        role: what it does.
        tiles: its bits in the first and in the second model; None where it is not there.
        losses: its predicted losses; None likewise.
    """

    layer: str
    role: str
    tiles: tuple[Tile | None, Tile | None]
    losses: tuple[float | None, float | None]


class Comparison(Document):
    """Two reports side by side.

    Args:
        first, second: the reports.
        names: what to call them, such as their files.
    """

    @checked(OptionError)
    def __init__(self, first: Report, second: Report, names: tuple[str, str] = ("first", "second")) -> None:
        """Match the layers of two reports by name. Raises OptionError for what is no report, such as a model."""
        self.reports, self.names = (first, second), names
        self.differences = _differences(first, second)
        self.layers = len({row.layer for report in self.reports for row in report.layers})

    def sections(self) -> list[Lines | Table]:
        """What each is, totals, and the layers that differ."""
        return [self._heads(), self.totals(), self.table()]

    def _heads(self) -> Lines:
        lines = [
            (name, f"{report.model_name}; {'no budget' if report.allocation is None else report.allocation.budget}; "
             f"recipe {report.card.get('recipe', 'unknown')}")
            for name, report in zip(self.names, self.reports, strict=True)
        ]  # fmt: skip
        return Lines("fxquant compare", tuple(lines))

    def totals(self) -> Table:
        """One line a quantity, and the second relative to the first."""
        rows = []
        for label, field, scale in _TOTALS:
            values = [getattr(report.totals, field) for report in self.reports]
            cells = [Cell("-" if value is None else f"{value / scale:.4g}") for value in values]
            rows.append((Cell(label), *cells, Cell(_relative(*values))))
        accuracies = [report.card.get("accuracy") for report in self.reports]
        if any(isinstance(found, dict) for found in accuracies):
            tops = [found.get("top1") if isinstance(found, dict) else None for found in accuracies]
            numbers = [top if isinstance(top, int | float) else None for top in tops]
            cells = [Cell("-" if top is None else f"{top:.2f}") for top in numbers]
            apart = "" if None in numbers else f"{(numbers[1] or 0) - (numbers[0] or 0):+.2f} points"
            rows.append((Cell("top-1 accuracy %"), *cells, Cell(apart)))
        return Table("Totals", ("", *self.names, "second against first"), tuple(rows))

    def table(self) -> Table:
        """The layers that differ, bits as weight/activation."""
        rows = tuple(
            (
                Cell(found.layer),
                Cell(found.role),
                *(Cell("not there" if tile is None else tile.label) for tile in found.tiles),
                *(Cell("-" if loss is None else f"{loss:.2e}") for loss in found.losses),
            )
            for found in self.differences
        )
        title = f"Layers whose bits differ: {len(rows)} of {self.layers}"
        bits, losses = ([f"{what} of {name}" for name in self.names] for what in ("bits", "loss"))
        return Table(title, ("layer", "role", *bits, *losses), rows, frozenset({0, 1}))

    def to_html(self) -> str:
        """One HTML page that needs no network."""
        sides = [
            html_page.grid_view(report) | {"name": name, "head": head[1]}
            for name, report, head in zip(self.names, self.reports, self._heads().lines, strict=True)
        ]
        return html_page.render(
            "compare.html", sides=sides, totals=self.totals(), table=self.table(), legend=html_page.LEGEND,
            differing={found.layer for found in self.differences},
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON values: `models`, [{"name", "model", "budget", "totals"}, ...], and `differences`."""
        models = [
            {
                "name": name,
                "model": report.card.get("model"),
                "budget": None if report.allocation is None else str(report.allocation.budget),
                "totals": report.totals.to_dict(),
            }
            for name, report in zip(self.names, self.reports, strict=True)
        ]
        differences = [
            {
                "layer": found.layer,
                "role": found.role,
                "bits": [None if tile is None else tile.label for tile in found.tiles],
                "predicted_loss": list(found.losses),
            }
            for found in self.differences
        ]
        return {"models": models, "layers": self.layers, "differences": differences}


def _differences(first: Report, second: Report) -> list[Difference]:
    """By the order of the first model, then of the second."""
    rows = [{row.layer: row for row in report.layers} for report in (first, second)]
    tiles = [{tile.layer: tile for tile in tiles_of(report.layers)} for report in (first, second)]
    found = []
    for layer in dict.fromkeys([*tiles[0], *tiles[1]]):
        a, b = (side.get(layer) for side in tiles)
        if a is not None and b is not None and (a.weight_bits, a.input_bits) == (b.weight_bits, b.input_bits):
            continue
        losses = [side[layer].predicted_loss if layer in side else None for side in rows]
        found.append(Difference(layer, (a or b or tiles[0][layer]).role, (a, b), (losses[0], losses[1])))
    return found


def _relative(first: float | None, second: float | None) -> str:
    return "" if not first or second is None else f"{second / first:.1%}"
