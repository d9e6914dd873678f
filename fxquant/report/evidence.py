"""What the page shows besides the tables: notes that passes left in the journal, read and checked.

A file comes from somebody else, so every value is held against its type and range; what is not as the passes write it
raises `ArtefactError`. A file of an earlier version has no such notes: then the page says what it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from allocators.problem.brief_table import from_brief
from allocators.problem.cost_table import CostTable
from fxquant.checks.untrusted import LIST, NOTHING, NUMBER, POSITIVE, Rule, checked, either, listed, mapped
from fxquant.quantizers.statistics.outline import Outline
from passes.allocate.allocate_bits import TABLE
from passes.allocate.measure_losses import REALISED
from passes.pipeline.journal import Journal
from passes.search.search_scales import OUTLINES
from passes.substitute.substitute_quantizers import LEVELS

_IMPORTANCE = "importance"  # of ScoreLayers with Mix-QViT's metric
_MOST_LEVELS = 64


@dataclass(frozen=True)
class Evidence:
    """What the choice of bits rests on, by layer and, of operands, in the order of the layer's own.

    Args:
        outlines: the histogram of every operand; None where it stays float.
        levels: the levels of its quantizer, or the least and the largest of many; None where it stays float.
        table: the problem that the allocator was given, in short; None: not known.
        importance: shares of relevance; empty without a recipe that measures it.
        realised: measured divergence of every operand at its width; empty where it was not measured.
    """

    outlines: Mapping[str, Sequence[Outline | None]] = field(default_factory=dict)
    levels: Mapping[str, Sequence[Sequence[float] | None]] = field(default_factory=dict)
    table: CostTable | None = None
    importance: Mapping[str, float] = field(default_factory=dict)
    realised: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, journal: Journal) -> Evidence:
        """Read the notes; of equal ones the last counts. Raises ArtefactError for notes of another shape."""
        notes: dict[str, Any] = {}
        for entry in journal.entries:
            notes |= entry.notes
        outlines = checked(notes.get(OUTLINES, {}), mapped(LIST), "the journal's histograms")
        return cls(
            {layer: [_outline(item, layer) for item in items] for layer, items in outlines.items()},
            _checked(notes, LEVELS, mapped(listed(either(NOTHING, listed(NUMBER, _MOST_LEVELS)), 2))),
            None if TABLE not in notes else from_brief(notes[TABLE]),
            _checked(notes, _IMPORTANCE, mapped(POSITIVE)),
            _checked(notes, REALISED, mapped(listed(either(NOTHING, NUMBER), 2))),
        )

    @property
    def lacks(self) -> list[str]:
        """Sentences on what is not known, and what brings it."""
        found = []
        if not self.outlines:
            found.append("This file keeps no histograms: they come from recipes that search scales, since version 0.2.")
        if self.table is None:
            found.append(
                "This file keeps no cost table, so the grid cannot be edited and there is no frontier: compile the "
                "model again with this version, with a recipe that allocates bits."
            )
        return found


def _outline(value: Any, layer: str) -> Outline | None:
    return None if value is None else Outline.from_json(value, f"the histogram of {layer}")


def _checked(notes: Mapping[str, Any], name: str, rule: Rule) -> Any:
    return checked(notes.get(name, {}), rule, f"the journal's {name.replace('_', ' ')}")
