"""`fxquant export`: an artefact as an ONNX model for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.commands import options as o


def export_model(
    artefact: Annotated[Path, typer.Argument(help="A file written by `fxquant compile` or `Compiled.save`.")],
    out: Annotated[Path, typer.Argument(help="ONNX model to write, such as model.onnx.")],
    weight_type: Annotated[
        str, typer.Option(help="int8; or int4, which writes weights of at most 4 bits as INT4.")
    ] = "int8",
    check: Annotated[
        bool, typer.Option(help="Run the model in ONNX Runtime before it is written, and compare with known answers.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Write an ONNX model with QuantizeLinear and DequantizeLinear nodes."""
    from fxquant.commands.console import emit, show
    from fxquant.export.onnx_check import check_onnxruntime
    from fxquant.export.onnx_file import check_export
    from fxquant.session.compiled import load

    o.check_output(out)
    check_export(weight_type)
    if check:
        check_onnxruntime()
    layers = load(artefact).export_onnx(out, weight_type=weight_type, check=check)
    size = out.stat().st_size
    if json:
        emit({"onnx": str(out), "bytes": size, "weight_type": weight_type, "layers": layers})
        return
    count = sum(how == "int8" for how in layers.values())
    rest = "" if count == len(layers) else "; the others by float operators"
    show(f"{out}: {size / 1e6:.3f} MB; {count} of {len(layers)} layers as int8{rest}")
