"""How long steps say how far they are, and to whom; `fxquant.report.progress` draws bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fxquant import ranks
from fxquant.checks.arguments import methods
from fxquant.errors import OptionError


class ProgressReporter(Protocol):
    """How long steps show that they advance; `fxquant.report.progress` has the rich one."""

    def track(self, label: str, total: int) -> ProgressTask:
        """Begin a step of `total` units."""


class ProgressTask(Protocol):
    """One running step."""

    def advance(self, units: int = 1) -> None:
        """Say that `units` more are done."""

    def close(self) -> None:
        """End the step."""


class SilentTask:
    """A step nobody watches."""

    def advance(self, units: int = 1) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class SilentProgress:
    """Shows nothing; the default."""

    def track(self, label: str, total: int) -> SilentTask:
        """Begin a step nobody watches."""
        return SilentTask()


@dataclass(frozen=True)
class CheckedProgress:
    """A reporter of the caller's whose steps are checked, so that a wrong one is named at once.

    reporter: the caller's. Raises OptionError where a step has no `advance` or no `close`.
    """

    reporter: ProgressReporter

    def track(self, label: str, total: int) -> ProgressTask:
        """Begin a step of `total` units, which the first of several ranks shows."""
        if not ranks.is_first():
            return SilentTask()
        task = self.reporter.track(label, total)
        methods("what the `track` of progress returns", task, ProgressTask, OptionError)
        return task


def reporter_of(progress: ProgressReporter | None) -> ProgressReporter:
    """Where steps are reported: to nobody for None."""
    return SilentProgress() if progress is None else CheckedProgress(progress)
