"""`fxquant export`: an artefact as an ONNX model for other runtimes, or as a program for the C library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.commands import options as o
from fxquant.commands.early_checks import check_ending, check_output
from fxquant.errors import ExportError


def export_model(
    artefact: Annotated[Path, typer.Argument(help="A file written by `fxquant compile` or `Compiled.save`.")],
    out: Annotated[
        Path,
        typer.Argument(help="What to write: model.onnx for ONNX, or model.fxm for the C library. The ending decides."),
    ],
    weight_type: Annotated[
        str,
        typer.Option(
            help="int8; int4: INT4 where no channel of a weight has more than 4 bits; packed: all in as many bits as "
            "they have."
        ),
    ] = "int8",
    runtime: Annotated[
        str, typer.Option(help="any; or onnxruntime, for the forms that ONNX Runtime runs fastest.")
    ] = "any",
    check: Annotated[
        bool, typer.Option(help="Run the model in ONNX Runtime before it is written, and compare with known answers.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Write an ONNX model with QuantizeLinear and DequantizeLinear nodes, or a program for the C library."""
    from fxquant.commands.console import emit, show
    from fxquant.export.onnx_file import check_export
    from fxquant.export.onnxruntime_model import check_onnxruntime
    from fxquant.export.program_file import SUFFIX
    from fxquant.report.progress import RichProgress
    from fxquant.session.compiled import load

    check_ending(out, ".onnx", SUFFIX)
    check_output(out)
    if out.suffix.lower() == SUFFIX:
        if weight_type != "int8" or runtime != "any" or check:
            raise ExportError(
                f"--weight-type, --runtime and --check are for ONNX; a {SUFFIX} file is checked in any case"
            )
        size = load(artefact).export_program(out)
        emit({"program": str(out), "bytes": size}) if json else show(f"{out}: {size / 1e6:.3f} MB; checked bit by bit")
        return
    check_export(weight_type, runtime)
    if check:
        check_onnxruntime()
    with RichProgress() as progress:
        progress.track("exporting by torch.onnx", 1)  # which does not say how far it is
        layers = load(artefact).export_onnx(out, weight_type=weight_type, runtime=runtime, check=check)
    size = out.stat().st_size
    if json:
        emit({"onnx": str(out), "bytes": size, "weight_type": weight_type, "runtime": runtime, "layers": layers})
        return
    count = sum(how == "int8" for how in layers.values())
    rest = "" if count == len(layers) else "; the others by float operators"
    show(f"{out}: {size / 1e6:.3f} MB; {count} of {len(layers)} layers as int8{rest}")
