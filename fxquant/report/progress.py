"""Progress bars for long steps, with the time that is left; nothing where stderr is no terminal and no notebook.

    fxquant.compile(model, "W4A4", calibration=images)                      # draws them, if anybody can see them
    fxquant.compile(model, "W4A4", calibration=images, progress=False)      # never
    with RichProgress() as progress:                                        # several calls, one display
        fxquant.compile(model, "W4A4", calibration=images, progress=progress)

Passes see only the protocol, `passes.pipeline.progress.ProgressReporter`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from passes.pipeline.progress import ProgressReporter, reporter_of


def bars_for(progress: ProgressReporter | bool | None) -> RichProgress | None:
    """The bars that a call draws itself: for True always, for None where somebody sees them; else None."""
    if progress is True:
        return RichProgress(Console(stderr=True, force_terminal=True))
    return RichProgress() if progress is None else None


def quiet(progress: ProgressReporter | bool | None) -> ProgressReporter | None:
    """The caller's own reporter; None for the words True, False and None."""
    return None if progress is None or isinstance(progress, bool) else progress


@contextmanager
def shown(progress: ProgressReporter | bool | None) -> Iterator[ProgressReporter]:
    """Where one call reports its steps: to the caller's own reporter, or to bars that end with the call."""
    bars = bars_for(progress)
    with bars or nullcontext():
        yield bars or reporter_of(quiet(progress))


class RichProgress:
    """A `ProgressReporter`: a bar per running step, with elapsed and remaining time, gone when the step ends.

    console: where to draw, stderr by default. Use it in a `with` statement, so that an error leaves no bar behind.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Draw nothing yet."""
        console = console or Console(stderr=True)
        label = TextColumn("{task.description}")
        columns = (label, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        is_seen = console.is_terminal or console.is_jupyter
        self._bars = Progress(*columns, console=console, transient=True, disable=not is_seen)
        self._running: set[TaskID] = set()

    def track(self, label: str, total: int) -> RichTask:
        """Begin a step of `total` units."""
        if not self._running:
            self._bars.start()
        task = self._bars.add_task(label, total=total)
        self._running.add(task)
        return RichTask(self, task)

    def advance(self, task: TaskID, units: int) -> None:
        """Say that `units` more of a step are done."""
        self._bars.advance(task, units)

    def end(self, task: TaskID) -> None:
        """Take a step's bar away; the display stops with the last one."""
        if task not in self._running:
            return
        self._running.discard(task)
        self._bars.remove_task(task)
        if not self._running:
            self._bars.stop()

    def __enter__(self) -> RichProgress:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every step that still runs."""
        for task in list(self._running):
            self.end(task)


class RichTask:
    """One running step of a `RichProgress`."""

    def __init__(self, owner: RichProgress, task: TaskID) -> None:
        """Belong to one bar."""
        self._owner, self._task = owner, task

    def advance(self, units: int = 1) -> None:
        """Say that `units` more are done."""
        self._owner.advance(self._task, units)

    def close(self) -> None:
        """End the step; closing twice does nothing."""
        self._owner.end(self._task)
