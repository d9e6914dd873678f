"""The report of a compiled model: print it, show it in a rich console, or take it as JSON values.

    print(quantized.report())               # plain text, the same at every terminal width
    rich.print(quantized.report())          # coloured by bits
    json.dumps(quantized.report().to_dict())
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from allocators.allocation import Allocation
from fxquant.report import sections
from fxquant.report.actions import actions_for
from fxquant.report.palette import colour, text_colour
from fxquant.report.sections import Lines, Table
from fxquant.report.totals import Totals
from fxquant.runtime.layer_row import LayerRow
from passes.contract import Journal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


class Report:
    """Tables per layer and in total.

    layers: one row per quantized layer. allocation: None for pipelines that allocate nothing. card: the protocol.
    show_layers: whether the printed report has the table of all layers.
    """

    def __init__(
        self,
        layers: Sequence[LayerRow],
        allocation: Allocation | None,
        journal: Journal,
        card: Mapping[str, Any],
        show_layers: bool = True,
    ) -> None:
        self.show_layers = show_layers
        self.layers, self.allocation, self.journal, self.card = list(layers), allocation, journal, card
        self.totals = Totals.of(self.layers, allocation, card)
        self.actions = actions_for(self.layers, allocation)

    @property
    def model_name(self) -> str:
        """The model's name and number of parameters."""
        return f"{self.card.get('model', 'unknown')} ({self.totals.parameters:,} parameters)"

    def sections(self) -> list[Lines | Table]:
        """The pieces in reading order."""
        found: list[Lines | Table] = [
            sections.header(self.model_name, self.allocation, self.card),
            sections.totals(self.totals),
            sections.grid(self.layers),
        ]
        if self.show_layers:
            found.append(sections.layer_table(self.layers, self.totals))
        found += [sections.actions(self.actions), sections.protocol(self.card), sections.journal_table(self.journal)]
        return found

    def brief(self) -> Report:
        """The report without the table of all layers."""
        return Report(self.layers, self.allocation, self.journal, self.card, show_layers=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything shown, as JSON values with full precision."""
        loss, weight_bytes = self.totals.predicted_loss or 1.0, self.totals.weight_bytes or 1.0
        layers = [
            {
                **row.to_dict(),
                "weight_bytes": row.weight_bytes if row.weight_bits is not None else 0.0,
                "loss_share": row.predicted_loss / loss,
                "bytes_share": row.weight_bytes / weight_bytes if row.weight_bits is not None else 0.0,
            }
            for row in self.layers
        ]
        return {
            "model": self.card.get("model"),
            "budget": None if self.allocation is None else str(self.allocation.budget),
            "allocation": None if self.allocation is None else asdict(self.allocation),
            "totals": self.totals.to_dict(),
            "layers": layers,
            "actions": [action.to_dict() for action in self.actions],
            "card": dict(self.card),
            "journal": [asdict(entry) for entry in self.journal.entries],
        }

    def __str__(self) -> str:
        """Plain text: no colour, no dependence on the terminal."""
        return "\n\n".join(plain(section) for section in self.sections())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Colour by bits; a table wider than the terminal comes as plain text, which can be scrolled or cut."""
        for section in self.sections():
            yield from _rich(section, options.max_width)


def plain(section: Lines | Table) -> str:
    """One piece as text; columns are as wide as their widest cell."""
    if isinstance(section, Lines):
        width = max((len(label) for label, _ in section.lines), default=0)
        lines = [f"  {label:<{width}}  {text}" if label else f"  {text}" for label, text in section.lines]
        return "\n".join([section.title, *lines])
    texts = [section.columns, *(tuple(cell.text for cell in row) for row in section.rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(section.columns))]
    lines = ["  ".join(_padded(text, widths[i], i in section.left) for i, text in enumerate(row)) for row in texts]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([section.title, *(f"  {line.rstrip()}" for line in (lines[0], rule, *lines[1:]))])


def _padded(text: str, width: int, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def _rich(section: Lines | Table, width: int) -> Iterator[RenderableType]:
    text = plain(section)
    if isinstance(section, Table) and max(map(len, text.splitlines())) <= width:
        yield Text(section.title, style="bold")
        yield _rich_table(section)
        return
    title, _, body = text.partition("\n")
    yield Text(title, style="bold")
    yield Text(f"{body}\n", no_wrap=isinstance(section, Table), overflow="ignore")


def _rich_table(section: Table) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, column in enumerate(section.columns):
        table.add_column(column, justify="left" if index in section.left else "right", no_wrap=True)
    for row in section.rows:
        table.add_row(*(Text(cell.text, style=_style(cell.bits)) for cell in row))
    return table


def _style(bits: int | None) -> str:
    if bits is None:
        return ""
    background = colour(bits)
    return f"{text_colour(background)} on {background}"
