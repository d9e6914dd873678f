"""What a rewrite of a lowering is: a guard that matches or says why not, and a change that only a match allows.

    found = match(graph_module, node)      # a match of the rewrite's own, or Miss(layer, reason)
    if isinstance(found, Miss):
        misses.append(found)
    else:
        rewrite(graph_module, found)

A rewrite is a pass (`passes.pipeline.contract`): a frozen dataclass that a backend lists in its pipeline. Each is sound
by itself, so one that is left out costs time and never changes a result. Misses go to the notes of the journal's entry,
from where the report takes them; their reasons are for a person who wants the layer to run faster.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fxquant.checks.untrusted import TEXT, checked, listed, mapped, record
from fxquant.graph.facts import QUANTIZED
from passes.pipeline.contract import PassContext

_LOGGER = logging.getLogger("fxquant")

REQUIRES = frozenset({QUANTIZED})
"""What every rewrite requires: it knows quantized nodes by the modules they call."""

MISSES = "lowering_misses"
"""Among the notes of a journal entry: what `note_misses` wrote."""


@dataclass(frozen=True, slots=True)
class Miss:
    """A pattern that does not hold. layer: where, by its public name. reason: why, and what would help, in words."""

    layer: str
    reason: str


class Named(Protocol):
    """Anything with a class."""


def note_misses(context: PassContext, rewrite: Named, misses: Iterable[Miss], outcome: str = "") -> None:
    """Add misses to the notes of the running pass, and log those with an outcome: they cost time and change no number.

    Args:
        context: the context of the pass that is running.
        rewrite: what missed; its name is noted.
        misses: the places where it did not fit, each with the reason.
        outcome: how the layers run instead, for the report; "" where nobody needs to know.
    """
    name, misses = type(rewrite).__name__, list(misses)
    for miss in misses if outcome else []:
        _LOGGER.info("%s: %s runs as %s, because %s", name, miss.layer, outcome, miss.reason)
    noted: list[Any] = list(context.journal.pending.get(MISSES, []))
    noted += [{"rewrite": name, "layer": m.layer, "reason": m.reason, "outcome": outcome} for m in misses]
    if noted:
        context.note(**{MISSES: noted})


def reported_misses(notes: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
    """By outcome and reason, the layers of a journal entry's misses that have an outcome.

    Raises ArtefactError for notes that are not as `note_misses` writes them.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for miss in checked(notes.get(MISSES, []), listed(mapped(TEXT)), "the notes on misses"):
        known = record(miss, _NOTE, "a note on a miss")
        if known["outcome"]:
            found.setdefault((known["outcome"], known["reason"]), []).append(known["layer"])
    return found


_NOTE = dict.fromkeys(("rewrite", "layer", "reason", "outcome"), TEXT)
