"""The report of a compiled model: print it, show it in a rich console, or take it as JSON values.

    print(quantized.report())               # plain text, the same at every terminal width
    rich.print(quantized.report())          # coloured by bits
    json.dumps(quantized.report().to_dict())
    Path("report.html").write_text(quantized.report().to_html())

What the pieces are: `fxquant.report.sections`; how they are drawn: `fxquant.report.render`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from allocators.allocation import Allocation
from fxquant.artefact.artefact import LoadedTexts
from fxquant.checks.untrusted import LIST, OBJECT, TEXT, Rule, checked, listed, mapped, whole
from fxquant.errors import ArtefactError
from fxquant.report import html_page, sections
from fxquant.report.actions import CANDIDATES, actions_for
from fxquant.report.render import Document
from fxquant.report.sections import Lines, Table
from fxquant.report.totals import Totals
from fxquant.runtime.layer_row import LayerRow
from passes.allocate.allocate_bits import TABLE
from passes.pipeline.journal import Journal, JournalEntry

# What the report reads from a card; whoever compiles may add any entries.
_CARD: dict[str, Rule] = {
    "first_last_weight_bits": mapped(listed(whole(1, 32))),
    "versions": mapped(TEXT),
    "preprocessing": OBJECT,
    "pipeline": listed(TEXT),
    "stays_float": listed(TEXT),
    "objective": mapped(TEXT),
    "parameters": whole(),
    "recipe": TEXT,
}


class Report(Document):
    """Tables per layer and in total.

    Args:
        layers: one row per quantized layer.
        allocation: the bits and how they were found; None for pipelines that allocate nothing.
        journal: one entry per pass.
        card: the protocol card of the compiled model.
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
        """Compute totals and actions. Raises ArtefactError for a card, or notes of a lowering, of the wrong shape."""
        check_card(card)
        self.layers, self.allocation, self.journal, self.card = list(layers), allocation, journal, card
        self.show_layers = show_layers
        self.totals = Totals.of(self.layers, allocation, card)
        self.actions = actions_for(self.layers, allocation, _candidates(journal))
        self.missed = sections.misses(journal)

    @classmethod
    def of_texts(cls, found: LoadedTexts, where: str) -> Report:
        """The report of an artefact, from what it says. Raises ArtefactError, naming `where`, for other values."""
        card = dict(found.card)
        rows = checked(card.pop("layers", None), LIST, f"the list of layers in the card of {where}")
        try:
            allocation = None if found.allocation_json is None else Allocation.from_json(found.allocation_json)
            journal = Journal([JournalEntry.from_dict(entry) for entry in found.journal])
            return cls([LayerRow.from_dict(row) for row in rows], allocation, journal, card)
        except ArtefactError as error:
            raise ArtefactError(f"{where} was not written by fxquant, or edited: {error}") from error

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
        found += [sections.actions(self.actions), *([] if self.missed is None else [self.missed])]
        found += [sections.protocol(self.card), sections.journal_table(self.journal)]
        return found

    def to_html(self) -> str:
        """One HTML page that needs no network: `fxquant.report.html_page`. Raises ArtefactError for odd notes."""
        return html_page.to_html(self)

    def brief(self) -> Report:
        """The report without the table of all layers."""
        return Report(self.layers, self.allocation, self.journal, self.card, show_layers=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything shown, as JSON values with full precision."""
        loss, weight_bytes = self.totals.predicted_loss or 1.0, self.totals.weight_bytes or 1.0
        layers = [
            {
                **row.to_dict(),
                **{name: getattr(row, name) for name in _ALSO},
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


_ALSO = ("parameters", "weight_bits", "activation_bits", "activation_elements", "pinned")
"""Of a layer's operands together, beside each of them."""


def _candidates(journal: Journal) -> list[int]:
    """Widths that bits were chosen from. Raises ArtefactError for a note of another shape."""
    table: Any = next((entry.notes[TABLE] for entry in reversed(journal.entries) if TABLE in entry.notes), {})
    widths = checked(table, OBJECT, "the journal's cost table").get("bits", list(CANDIDATES))
    return sorted(checked(widths, listed(whole(1, 32)), "the widths in the journal's cost table"))


def check_card(card: Mapping[str, Any]) -> None:
    """Raise ArtefactError where a card is not as `fxquant.compile` writes it, and a report reads it."""
    for name, rule in _CARD.items():
        if card.get(name) is not None:
            checked(card[name], rule, f"the card's '{name}'")
