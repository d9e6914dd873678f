"""Work that goes on where it was: the state of a long pass, kept while it runs.

    checkpoint = Checkpoint(context.cache, context.signature(graph_module, repr(self)))
    kept = checkpoint.load()                        # texts and tensors of a process that was killed, or None
    for step in range(done(kept), steps):
        ...
        checkpoint.save(lambda: ({}, tensors()))    # where enough work has been done since the last time

A result that is complete in itself, of one layer or one block, needs no state: `Cache.recall_tensors` keeps it. Passes
that stream over the calibration images have `PassContext.gather`.

Of several ranks the first keeps a state for all; where each holds something else, each keeps a state of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from fxquant import ranks
from fxquant.artefact.cache import Cache, Kept, signature


class Checkpoint:
    """The state of long work, kept as a part while it goes on, so that a killed process continues from there.

    Args:
        cache: where the state is kept; without a folder it is not.
        key: signature of all that the work depends on.
        every_s: wall seconds of work between two writes; ten times what a write takes where that is more, so that
            keeping a large state never costs more than a tenth of the time.
        of_each: whether every rank keeps a state of its own. All write at the same calls of `save`, and still a run
            that was killed while they did, or that finds another machine's folder, loads states that do not belong
            together: who loads has to compare. Another number of ranks finds none.
    """

    def __init__(self, cache: Cache, key: str, every_s: float = 1.0, *, of_each: bool = False) -> None:
        self._cache, self._every_s, self._of_each = cache, every_s, of_each
        self._key = signature(key, ranks.number(), ranks.count()) if of_each else key
        self._kept_s, self._cost_s = time.perf_counter(), 0.0

    def load(self) -> Kept | None:
        """The texts and tensors kept last; None where there are none."""
        with self._whoever_keeps():
            found = self._cache.read(self._key, part=True)
        self._kept_s = time.perf_counter()
        return found

    def save(self, state: Callable[[], Kept], *, last: bool = False) -> None:
        """Keep a state, texts and tensors, where it is due, in place of the one before. last: in any case."""
        if self._cache.folder is None:
            return
        started_s = time.perf_counter()
        is_due = last or started_s - self._kept_s >= max(self._every_s, 10 * self._cost_s)
        if self._of_each:
            is_due = all(ranks.from_all("keeping what is gathered", is_due))
        if is_due:
            started_s = time.perf_counter()
            with self._whoever_keeps():
                self._cache.write(self._key, *state(), part=True)
            self._kept_s = time.perf_counter()
            self._cost_s = self._kept_s - started_s

    def _whoever_keeps(self) -> AbstractContextManager[None]:
        return ranks.alone() if self._of_each else nullcontext()
