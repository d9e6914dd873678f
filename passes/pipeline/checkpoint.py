"""Work that goes on where it was: the state of a long pass, kept while it runs.

    checkpoint = Checkpoint(context.cache, context.signature(graph_module, repr(self)))
    kept = checkpoint.load()                        # texts and tensors of a process that was killed, or None
    for step in range(done(kept), steps):
        ...
        checkpoint.save(lambda: ({}, tensors()))    # where enough work has been done since the last time

A result that is complete in itself, of one layer or one block, needs no state: `Cache.recall_tensors` keeps it. Passes
that stream over the calibration images have `PassContext.gather`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fxquant.artefact.cache import Cache, Kept


class Checkpoint:
    """The state of long work, kept as a part while it goes on, so that a killed process continues from there.

    Args:
        cache: where the state is kept; without a folder it is not.
        key: signature of all that the work depends on.
        every_s: wall seconds of work between two writes; ten times what a write takes where that is more, so that
            keeping a large state never costs more than a tenth of the time.
    """

    def __init__(self, cache: Cache, key: str, every_s: float = 1.0) -> None:
        self._cache, self._key, self._every_s = cache, key, every_s
        self._kept_s, self._cost_s = time.perf_counter(), 0.0

    def load(self) -> Kept | None:
        """The texts and tensors kept last; None where there are none."""
        found = self._cache.read(self._key, part=True)
        self._kept_s = time.perf_counter()
        return found

    def save(self, state: Callable[[], Kept], *, last: bool = False) -> None:
        """Keep a state, texts and tensors, where it is due, in place of the one before. last: in any case."""
        started_s = time.perf_counter()
        is_due = started_s - self._kept_s >= max(self._every_s, 10 * self._cost_s)
        if self._cache.folder is not None and (is_due or last):
            self._cache.write(self._key, *state(), part=True)
            self._kept_s = time.perf_counter()
            self._cost_s = self._kept_s - started_s
