"""Sections as plain text, the same at every terminal width, or in a rich console, coloured by bits."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from fxquant.report.palette import colour, text_colour
from fxquant.report.sections import Lines, Table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


_BETWEEN, _EDGES = 3, 2  # characters that rich puts between two columns, and around all of them


class Document:
    """Something made of sections: print it, or give it to a rich console."""

    def sections(self) -> list[Lines | Table]:
        """The pieces in reading order."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Plain text: no colour, no dependence on the terminal."""
        return "\n\n".join(plain(section) for section in self.sections())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Colour by bits; what is wider than the terminal is broken: lines at words, a table between columns."""
        for section in self.sections():
            yield from _rich(section, options.max_width)


class Page(Document):
    """A document of given sections."""

    def __init__(self, *sections: Lines | Table) -> None:
        """Keep the pieces, in reading order."""
        self._sections = list(sections)

    def sections(self) -> list[Lines | Table]:
        """The pieces in reading order."""
        return self._sections


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
    yield Text(section.title, style="bold")
    if isinstance(section, Table):
        yield from map(_rich_table, _parts(section, width))
    else:
        yield Text("\n".join([*_folded(section, width), ""]))


def _parts(table: Table, width: int) -> Iterator[Table]:
    """The table in pieces that fit the width, one below the other, each with the first column again."""
    widths = [max(map(len, texts)) for texts in zip(table.columns, *_texts(table), strict=True)]
    wanted = [0]
    for index, own in enumerate(widths[1:], 1):
        used = sum(widths[each] + _BETWEEN for each in wanted)
        if len(wanted) > 1 and used + own + _EDGES > width:
            yield _part(table, wanted)
            wanted = [0]
        wanted.append(index)
    yield _part(table, wanted)


def _texts(table: Table) -> list[tuple[str, ...]]:
    return [tuple(cell.text for cell in row) for row in table.rows]


def _part(table: Table, wanted: list[int]) -> Table:
    return Table(
        table.title,
        tuple(table.columns[index] for index in wanted),
        tuple(tuple(row[index] for index in wanted) for row in table.rows),
        frozenset(place for place, index in enumerate(wanted) if index in table.left),
    )


def _folded(section: Lines, width: int) -> Iterator[str]:
    """The lines, those that are too long broken at words and indented under their text."""
    column = max((len(label) for label, _ in section.lines), default=0)
    for label, text in section.lines:
        first = f"  {label:<{column}}  " if label else "  "
        indent = len(first) + (0 if label else len(text) - len(text.lstrip()) + 2)
        yield from textwrap.wrap(
            text, width, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
        ) or [first.rstrip()]


def _rich_table(section: Table) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, column in enumerate(section.columns):
        table.add_column(Text(column), justify="left" if index in section.left else "right", no_wrap=True)
    for row in section.rows:
        table.add_row(*(Text(cell.text, style=_style(cell.bits)) for cell in row))
    return table


def _style(bits: int | None) -> str:
    if bits is None:
        return ""
    background = colour(bits)
    return f"{text_colour(background)} on {background}"
