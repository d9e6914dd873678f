"""Where commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def emit(value: Any) -> None:
    """JSON on stdout."""
    print(to_json(value))


def to_json(value: Any) -> str:
    """JSON text; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=2)


def show(renderable: Any) -> None:
    """Coloured on a terminal, plain text into a file or a pipe."""
    if out.is_terminal:
        out.print(renderable)
    else:
        print(renderable)


def say(text: str) -> None:
    """A line about what goes on, on stderr."""
    err.print(Text(text), soft_wrap=True)


def warn(text: str) -> None:
    """A line that must not be missed, on stderr."""
    err.print(Text(f"warning: {text}", style="bold yellow"), soft_wrap=True)


def fail(text: str) -> None:
    """The one line of an error, on stderr."""
    err.print(Text(f"error: {text}", style="bold red"), soft_wrap=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    is_strange = isinstance(value, float) and (value != value or abs(value) == float("inf"))
    return None if is_strange else value
