"""`fxquant benchmark`: latency and throughput of an artefact, in float and as integers, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxquant.commands import options as o
from fxquant.commands.early_checks import check_output

if TYPE_CHECKING:
    from fxquant.measure.timing import Timing
    from fxquant.report.sections import Table


def benchmark_model(
    artefact: Annotated[Path, typer.Argument(help="A file written by `fxquant compile` or `Compiled.save`.")],
    backend: Annotated[list[str] | None, typer.Option(help=f"{o.BACKENDS_HELP}. Repeatable.")] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, max=65_536, help="Repeatable; 1 and 32 by default.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads that torch and the kernels use.")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="How long each batch size is measured.")] = 10.0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="With torch.compile, which needs a C++ compiler.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Plot to write: .png, .svg or .pdf.")] = None,
    json: o.Json = False,
) -> None:
    """Time float32, bfloat16 and integer execution of the same graph, in turns on this machine."""
    import torch

    from fxquant.commands.console import emit, show
    from fxquant.graph.notes import IMAGE_SHAPE
    from fxquant.measure.timing import Variant, bfloat16_variant, float_graph, measure
    from fxquant.report.plots import check_plot, plot_latency
    from fxquant.report.progress import RichProgress
    from fxquant.report.render import Page
    from fxquant.report.sections import Lines
    from fxquant.runtime.native import library
    from fxquant.session.compiled import load
    from passes.lower.lower import resolved

    check_output(plot)
    if plot is not None:
        check_plot(plot)
    simulated = load(artefact)
    reference = float_graph(simulated.graph_module)
    variants: dict[str, Variant] = {"float32": reference, "bfloat16": bfloat16_variant(reference)}
    if compiled:
        variants["float32 compiled"] = torch.compile(reference)
        variants["bfloat16 compiled"] = torch.compile(bfloat16_variant(reference))
    execution = {}
    for name in backend or ["auto"]:
        lowered = simulated.lowered(name)
        execution[name] = str(lowered.card["execution"])
        variants[name] = lowered
    shape = IMAGE_SHAPE.of(simulated.graph_module)
    timings: list[Timing] = []
    with RichProgress() as progress:
        for size in batch_size or [1, 32]:
            images = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0))
            timings += measure(variants, images, threads=threads, seconds=seconds, progress=progress)
    if plot is not None:
        plot_latency(plot, [(t.variant, t.batch_size, t.images_per_second) for t in timings])
    if json:
        emit({"artefact": str(artefact), "execution": execution, "timings": [t.to_dict() for t in timings]})
        return
    how = list(execution.items())
    if "cpu-native" in map(resolved, execution):
        how.append(("", library.speed_of_widths()))
    show(Page(Lines("How integers run", tuple(how)), _table(timings)))


def _table(timings: list[Timing]) -> Table:
    from fxquant.report.sections import Cell, Table

    columns = ("", "batch", "ms", "images/s", "speed-up", "by CPU time")
    rows = (
        (t.variant, str(t.batch_size), f"{t.latency_ms:.2f}", f"{t.images_per_second:.1f}", f"{t.speedup:.2f}x",
         f"{t.cpu_speedup:.2f}x")
        for t in timings
    )  # fmt: skip
    title = f"Time of a batch, {timings[0].threads} thread{'s' if timings[0].threads > 1 else ''}"
    return Table(title, columns, tuple(tuple(map(Cell, row)) for row in rows), frozenset({0}))
