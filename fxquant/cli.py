"""The command line: `fxquant demo`, `compile`, `inspect`, `evaluate`, `sweep`, `frontier`, `reproduce`,
`synthesize`, `benchmark`, `export`, `report`, `compare`, `plot`, `list`, `doctor`.

Results go to stdout (pure JSON with --json), everything else to stderr. Errors are one line, exit code 2; so is Ctrl-C,
exit code 130.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fxquant import __version__, ranks
from fxquant.commands.benchmark_model import benchmark_model
from fxquant.commands.compare_artefacts import compare_artefacts
from fxquant.commands.compile_model import compile_model
from fxquant.commands.demo import demo
from fxquant.commands.doctor import doctor
from fxquant.commands.evaluate_model import evaluate_model
from fxquant.commands.export_model import export_model
from fxquant.commands.inspect_artefact import inspect_artefact
from fxquant.commands.list_parts import list_parts
from fxquant.commands.plot_tensor import plot_tensor
from fxquant.commands.report_artefact import report_artefact
from fxquant.commands.reproduce_table import reproduce_table
from fxquant.commands.show_frontier import show_frontier
from fxquant.commands.sweep_budgets import sweep_budgets
from fxquant.commands.synthesize_images import synthesize_images
from fxquant.errors import DistributedError, FxQuantError, LostRankError


class _Commands(TyperGroup):
    """Commands whose typed errors become one line on stderr and exit code 2, without a traceback; Ctrl-C gives 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            with ranks.launched({"command line": sys.argv[1:]}):
                return super().invoke(ctx)
        except FxQuantError as error:
            from fxquant.commands.console import fail

            # Of several ranks the first tells what is the same on all; whom another has left, tells it itself.
            fail(str(error), by_all=isinstance(error, LostRankError))
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            from fxquant.commands.console import fail

            fail("interrupted")
            raise typer.Exit(130) from error  # 128 and the number of SIGINT, as shells have it


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fxquant {__version__}")
        raise typer.Exit


_SHARED_OUT = ("compile", "evaluate", "sweep", "frontier", "reproduce", "synthesize")
"""Commands whose work ranks of torchrun share out."""


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Mixed-precision post-training quantization of Vision Transformers."""
    if ranks.count() > 1 and context.invoked_subcommand not in _SHARED_OUT:
        raise DistributedError(
            f"torchrun has started {ranks.count()} ranks, and {context.invoked_subcommand} has nothing to share out: "
            f"run it without torchrun, or run one of {', '.join(_SHARED_OUT)}"
        )


app.command("demo")(demo)
app.command("compile")(compile_model)
app.command("inspect")(inspect_artefact)
app.command("evaluate")(evaluate_model)
app.command("sweep")(sweep_budgets)
app.command("frontier")(show_frontier)
app.command("reproduce")(reproduce_table)
app.command("synthesize")(synthesize_images)
app.command("benchmark")(benchmark_model)
app.command("export")(export_model)
app.command("report")(report_artefact)
app.command("compare")(compare_artefacts)
app.command("plot")(plot_tensor)
app.command("list")(list_parts)
app.command("doctor")(doctor)


def main() -> None:
    """Run the command line; output that cannot be written is one line on stderr and exit code 2.

    A closed pipe (`fxquant inspect model.fxq | head`) ends quietly with exit code 1.
    """
    from fxquant.commands.console import discard_output, fail

    if sys.stdout is None:
        fail("stdout is closed, and results go there: redirect it to a file, or to /dev/null")
        sys.exit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths may hold what no encoding has
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        sys.exit(1)
    except OSError as error:
        discard_output()
        fail(f"output cannot be written: {error}")
        sys.exit(2)
