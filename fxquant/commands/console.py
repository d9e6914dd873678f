"""Where commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from fxquant import ranks

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def emit(value: Any) -> None:
    """JSON on stdout; of several ranks, the first's."""
    if ranks.is_first():
        print(to_json(value))


def to_json(value: Any) -> str:
    """JSON text; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=2)


def show(renderable: Any) -> None:
    """Coloured on a terminal, plain text into a file or a pipe; of several ranks, the first's."""
    if not ranks.is_first():
        return
    if out.is_terminal:
        out.print(renderable)
    else:
        print(renderable)


def show_list(title: str, rows: dict[str, str]) -> None:
    """Names with a text on each, broken to the width of the terminal."""
    width = max(50, shutil.get_terminal_size().columns)
    column = min(max(map(len, rows), default=0), width // 3)
    lines = [title]
    for name, text in rows.items():
        first = f"  {name:<{column}}  "
        lines += textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * (column + 4)) or [
            first.rstrip()
        ]
    show("\n".join(lines))


def say(text: str) -> None:
    """A line about what goes on, on stderr."""
    _on_stderr(Text(text))


def warn(text: str) -> None:
    """A line that must not be missed, on stderr."""
    _on_stderr(Text(f"warning: {text}", style="bold yellow"))


def fail(text: str, by_all: bool = False) -> None:
    """The one line of an error, on stderr. by_all: of several ranks, all say it."""
    _on_stderr(Text(f"error: {text}", style="bold red"), by_all)


def discard_output() -> None:
    """Send what stdout still holds to nowhere, so that Python does not try to write it again when it ends."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _on_stderr(line: Text, by_all: bool = False) -> None:
    if not (ranks.is_first() or by_all):
        return
    with suppress(OSError, ValueError):  # a stderr that cannot be written must not stop the work
        err.print(line, soft_wrap=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    is_strange = isinstance(value, float) and (value != value or abs(value) == float("inf"))
    return None if is_strange else value
