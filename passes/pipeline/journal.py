"""What happened while a pipeline ran: an entry for every pass, with the notes it left."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from fxquant.checks import untrusted
from fxquant.checks.untrusted import OBJECT, POSITIVE, TEXT, record

_LOGGER = logging.getLogger("fxquant")


@dataclass(frozen=True)
class JournalEntry:
    """One pass as it ran: its repr, nodes changed, wall seconds, peak resident memory of the process in MiB, notes.

    Args:
        step: the repr of the pass.
        nodes_changed: how many nodes it changed.
        seconds: how long the pass took by the clock.
        peak_mib: see `peak_mib`.
        notes: what the pass says of its run, JSON values.
    """

    step: str
    nodes_changed: int
    seconds: float
    peak_mib: float
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any) -> JournalEntry:
        """From the fields by name, as a file has them. Raises ArtefactError for anything else."""
        return cls(**record(values, _ENTRY, "a journal entry", {"notes": OBJECT}))


_ENTRY = {"step": TEXT, "nodes_changed": untrusted.whole(), "seconds": POSITIVE, "peak_mib": POSITIVE}


@dataclass
class Journal:
    """What happened: one entry per pass, in order. Passes add notes through `PassContext.note`."""

    entries: list[JournalEntry] = field(default_factory=list)
    pending: dict[str, Any] = field(default_factory=dict)

    def close_step(self, step: str, nodes_changed: int, seconds: float, peak_mib: float) -> None:
        """Append the entry of a pass that has ended, with the notes it left, and log it.

        Args:
            step: the repr of the pass.
            nodes_changed: how many nodes it changed.
            seconds: how long the pass took by the clock.
            peak_mib: largest resident memory of the process so far, in MiB.
        """
        self.entries.append(JournalEntry(step, nodes_changed, seconds, peak_mib, self.pending))
        self.pending = {}
        _LOGGER.info("%s: %d nodes changed, %.2f s", step, nodes_changed, seconds)


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB; 0 where the system does not say, as on Windows."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
