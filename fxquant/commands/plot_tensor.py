"""`fxquant plot`: the figures that papers on quantized Vision Transformers print, of any model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.commands import options as o
from fxquant.commands.early_checks import check_output, refuse_unused

KINDS = ("tensor", "boxes", "means", "layers")


def plot_tensor(
    kind: Annotated[
        str,
        typer.Argument(
            help="tensor: histograms of one tensor before and after its quantizer; boxes: box plots by block; means: "
            "how far one image's channel means lie from all images'; layers: the divergence of single layers."
        ),
    ],
    model: o.Model,
    out: Annotated[Path, typer.Argument(help="Figure to write: .png, .svg or .pdf.")],
    layer: Annotated[str | None, typer.Option(help="For tensor: the layer, such as blocks.3.mlp.fc2.")] = None,
    operand: Annotated[str, typer.Option(help="For tensor: weight, input, left or right.")] = "input",
    source: Annotated[
        str, typer.Option(help="For boxes: what the tensors hold, such as post_layer_norm.")
    ] = "post_gelu",
    bits: Annotated[int, typer.Option(min=2, max=8, help="Width of the quantizers.")] = 4,
    calibration: o.Calibration = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    model_option: o.ModelOption = None,
    images: o.Images = 32,
    recipe: o.Recipe = "mptq_vit",
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    cache: o.CacheFolder = None,
    no_cache: o.NoCache = False,
) -> None:
    """Draw what quantizers do to the tensors of a model."""
    from fxquant.commands.console import say
    from fxquant.errors import OptionError
    from fxquant.graph.annotation import Source
    from fxquant.report.plots import check_plot
    from fxquant.report.progress import RichProgress
    from fxquant.session import tensor_figures as figures
    from fxquant.session.session import Session

    check_output(out)
    check_plot(out)
    if kind not in KINDS:
        raise OptionError(f"there is no plot {kind!r}; there are {', '.join(KINDS)}")
    if kind != "tensor":
        refuse_unused({"--layer": layer}, f"the plot of {kind} is of all layers")
    elif layer is None:
        raise OptionError("the plot of a tensor needs --layer, such as --layer blocks.3.mlp.fc2")
    if source not in list(Source):
        raise OptionError(f"there is no source {source!r}; there are {', '.join(Source)}")
    kept = o.cache_folder(cache, no_cache)
    named = o.named_model(model, weights, num_classes, model_option, device)
    found = o.calibration_images(calibration, images, named.preprocessing, seed, model == "embedded")
    with RichProgress() as progress:
        session = Session(named.model, found, recipe=recipe, seed=seed, cache=kept, progress=progress)
        if kind == "tensor":
            figures.figure_of_tensor(session, out, layer or "", bits, operand)
        elif kind == "boxes":
            figures.figure_of_boxes(session, out, Source(source), bits)
        elif kind == "means":
            figures.figure_of_means(session, out)
        else:
            figures.figure_of_layers(session, out, bits)
    say(f"{out}: {out.stat().st_size / 1e3:.0f} KB")
