"""`fxquant report`: the report of an artefact as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.commands.early_checks import PAGE, check_ending, check_output
from fxquant.commands.options import BACKENDS_HELP
from passes.lower.lower import SIMULATED


def report_artefact(
    artefact: Annotated[Path, typer.Argument(help="A file written by `fxquant compile` or `Compiled.save`.")],
    out: Annotated[Path, typer.Argument(help="The page to write, such as report.html.")],
    backend: Annotated[
        str, typer.Option(help=f"Also load it with a backend, to say what runs in which kernel: {BACKENDS_HELP}.")
    ] = SIMULATED,
    time: Annotated[
        bool, typer.Option("--time", help="Also measure the kernel of every layer on this machine, for one image.")
    ] = False,
) -> None:
    """Write a page to read, to try other bits in, and to copy overrides from; it needs no network."""
    from fxquant.artefact.container import write_file
    from fxquant.commands.console import say
    from fxquant.commands.inspect_artefact import report_of
    from fxquant.measure.layer_times import layer_times
    from fxquant.report.progress import RichProgress
    from fxquant.session.compiled import load

    check_ending(out, *PAGE)
    check_output(out)
    if backend == SIMULATED and not time:
        report = report_of(artefact)
    else:
        simulated = load(artefact)
        compiled = simulated if backend == SIMULATED else simulated.lowered(backend)
        if time:
            with RichProgress() as progress:
                compiled.card["layer_times"] = layer_times(simulated.graph_module, progress)
        report = compiled.report()
    write_file(out, report.to_html().encode(errors="replace"))
    say(f"{out}: {out.stat().st_size / 1e3:.0f} KB; open it in a browser")
