"""`fxquant inspect`: what an artefact holds, without loading its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxquant.commands.early_checks import check_output
from fxquant.commands.options import Json

if TYPE_CHECKING:
    from fxquant.report.tables import Report


def inspect_artefact(
    artefact: Annotated[Path, typer.Argument(help="A file written by `fxquant compile` or `Compiled.save`.")],
    layers: Annotated[bool, typer.Option("--layers", help="With the table of all layers.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="With the annotated graph, which loads the model.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Picture of the bits to write, .svg; .dot loads it.")] = None,
    json: Json = False,
) -> None:
    """Show how an artefact came about, its bits and where its bytes go."""
    from fxquant.artefact.artefact import size_breakdown
    from fxquant.commands.console import emit, show
    from fxquant.graph.printer import format_graph
    from fxquant.report.picture import check_picture, write_picture
    from fxquant.session.compiled import load

    check_output(picture)
    if picture is not None:
        check_picture(picture)
    report, sizes = report_of(artefact), size_breakdown(artefact)
    needs_graph = graph or (picture is not None and picture.suffix.lower() == ".dot")
    graph_module = load(artefact).graph_module if needs_graph else None
    if picture is not None:
        title = str(report.card.get("model", ""))
        write_picture(picture, report.layers if graph_module is None else graph_module, title)
    text = format_graph(graph_module) if graph and graph_module is not None else None
    if json:
        emit({**report.to_dict(), "sizes": sizes, **({} if text is None else {"graph": text.splitlines()})})
        return
    show(report if layers else report.brief())
    show("\nBytes in the file")
    for name, size in sizes.items():
        show(f"  {name.replace('_', ' '):<20} {size:>13,}")
    if text is not None:
        show(f"\nGraph\n{text}")


def report_of(path: Path) -> Report:
    """The report of an artefact, from its texts. Raises ArtefactError, also where the file is damaged."""
    from fxquant.artefact.artefact import load_texts
    from fxquant.report.tables import Report

    return Report.of_texts(load_texts(path), str(path))
