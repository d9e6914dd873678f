"""`fxquant compare`: two artefacts side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.commands.early_checks import PAGE, check_ending, check_output
from fxquant.commands.options import Json


def compare_artefacts(
    first: Annotated[Path, typer.Argument(help="A file written by `fxquant compile` or `Compiled.save`.")],
    second: Annotated[Path, typer.Argument(help="The one to compare it with.")],
    html: Annotated[Path | None, typer.Option("--html", help="Page to write as well, such as compare.html.")] = None,
    json: Json = False,
) -> None:
    """Show totals of two artefacts side by side, and the layers whose bits differ."""
    from fxquant.artefact.container import write_file
    from fxquant.commands.console import emit, say, show
    from fxquant.commands.inspect_artefact import report_of
    from fxquant.report.comparison import Comparison

    check_ending(html, *PAGE)
    check_output(html)
    names = (str(first), str(second)) if first.name == second.name else (first.name, second.name)
    found = Comparison(report_of(first), report_of(second), names)
    if html is not None:
        write_file(html, found.to_html().encode(errors="replace"))
        say(f"{html}: open it in a browser")
    if json:
        emit(found.to_dict())
    else:
        show(found)
