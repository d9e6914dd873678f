"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxquant.errors import BudgetError, DataError, OverrideError

if TYPE_CHECKING:
    from torch import Tensor

    from allocators.allocator import Allocator
    from allocators.overrides import Bits
    from fxquant.data import ImageData, Preprocessing
    from fxquant.models import NamedModel

Json = Annotated[bool, typer.Option("--json", help="Pure JSON on stdout; everything else goes to stderr.")]
Model = Annotated[str, typer.Argument(help='A timm architecture, or "embedded".')]
Weights = Annotated[Path | None, typer.Option(help="Local .safetensors or state dict; without it weights are random.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes of the model's head.")]
ModelOption = Annotated[
    list[str] | None, typer.Option("--model-option", help="name=value for timm.create_model, such as img_size=96.")
]
Calibration = Annotated[
    Path | None, typer.Option(help="Folder or .npz of images, no labels needed; the embedded model has its own.")
]
Data = Annotated[Path | None, typer.Option(help="Class folders, or .npz with labels; the embedded model has its own.")]
Images = Annotated[int, typer.Option(min=1, help="How many calibration images.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Evaluate on this many images, evenly spread over the data.")]
Recipe = Annotated[str, typer.Option(help="mptq_vit, mptq_vit_plus, lampq, vt_ptq, tsptq_vit or naive_min_max.")]
AllocatorName = Annotated[str | None, typer.Option("--allocator", help="milp, greedy, uniform; else the recipe's own.")]
Override = Annotated[
    list[str] | None, typer.Option(help="layer=6 or layer=4/8 (weight/activation); name, role or glob. Repeatable.")
]
FirstLastBits = Annotated[int | None, typer.Option(help="Pin patch embedding and head to these bits.")]
FullyQuantized = Annotated[bool, typer.Option("--fully-quantized", help="Quantize softmax and LayerNorm inputs too.")]
Seed = Annotated[int, typer.Option(help="Of every random draw, and of which calibration images are taken.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per step; bounds memory.")]
ImageSize = Annotated[int | None, typer.Option(help="Height and width of the model's input.")]
CropPct = Annotated[float | None, typer.Option(help="Share of the resized image that the centre crop keeps.")]
Mean = Annotated[str | None, typer.Option(help="Per channel, comma-separated: 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(help="Per channel, comma-separated.")]
Interpolation = Annotated[str | None, typer.Option(help="nearest, bilinear or bicubic.")]


def allocator_named(name: str | None) -> Allocator | None:
    """The allocator of this name; None, the recipe's default, for None. Raises BudgetError."""
    from allocators.greedy import Greedy
    from allocators.milp import Milp
    from allocators.uniform import Uniform

    known: dict[str, Allocator] = {"milp": Milp(), "greedy": Greedy(), "uniform": Uniform()}
    if name is not None and name not in known:
        raise BudgetError(f"no allocator is called {name!r}; there are {', '.join(known)}")
    return None if name is None else known[name]


def parse_overrides(texts: list[str] | None) -> dict[str, Bits]:
    """`["blocks.0.mlp.fc1=6", "fc2=4/8", "head=8/-"]` as `fxquant.compile` takes them. Raises OverrideError."""
    found: dict[str, Bits] = {}
    for text in texts or []:
        layer, _, bits = text.rpartition("=")
        parts = bits.split("/")
        is_read = all(part.isdigit() or (part == "-" and len(parts) == 2) for part in parts)
        if not layer or len(parts) > 2 or not is_read:
            raise OverrideError(f"an override reads layer=6, or layer=4/8 for weight/activation bits; found {text!r}")
        widths = [int(part) if part.isdigit() else None for part in parts]
        found[layer] = (widths[0], widths[1]) if len(widths) == 2 else int(bits)
    return found


def parse_numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    """`0.5,0.5,0.5` as numbers. Raises DataError."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(f"{name} must be numbers with commas between, such as 0.5,0.5,0.5; found {text!r}") from error


def with_options(
    preprocessing: Preprocessing,
    image_size: int | None,
    crop_pct: float | None,
    mean: str | None,
    std: str | None,
    interpolation: str | None,
) -> Preprocessing:
    """The preprocessing with what the command line says."""
    numbers = {"mean": parse_numbers(mean, "mean"), "std": parse_numbers(std, "std")}
    return preprocessing.with_options(image_size=image_size, crop_pct=crop_pct, interpolation=interpolation, **numbers)


def named_model(name: str, weights: Path | None, num_classes: int | None, options: list[str] | None) -> NamedModel:
    """The model, with a loud word where nobody trained it."""
    from fxquant.commands.console import warn
    from fxquant.models import load_model, parse_option

    given: dict[str, Any] = dict(parse_option(text) for text in options or [])
    found = load_model(name, weights, num_classes, **given)
    if found.is_random:
        warn(f"{name} has RANDOM weights: sizes, bits and times are real, accuracy means nothing; give --weights")
    return found


def labelled_images(path: Path | None, preprocessing: Preprocessing, is_embedded: bool) -> ImageData:
    """Labelled images, the embedded ones where no path is needed. Raises DataError."""
    from fxquant.data import ImageData, embedded_test

    if path is None and not is_embedded:
        raise DataError("give labelled images: --data FOLDER or --data FILE.npz")
    data = embedded_test() if path is None else ImageData.open(path, preprocessing)
    data.check_labels()
    return data


def calibration_images(
    path: Path | None, count: int, preprocessing: Preprocessing, seed: int, is_embedded: bool
) -> Tensor:
    """Calibration images (N, C, H, W), the embedded ones where no path is needed. Raises DataError."""
    from fxquant import embedded
    from fxquant.data import load_images

    if path is not None:
        return load_images(path, count, preprocessing, seed)
    if not is_embedded:
        raise DataError("give calibration images: --calibration FOLDER or --calibration FILE.npz")
    return embedded.calibration_images(count)


def check_output(*paths: Path | None) -> None:
    """Fail before the work and not after it: raises DataError where a file could not be written."""
    for path in paths:
        if path is not None and path.is_dir():
            raise DataError(f"{path} is a folder: give the name of a file in it")
        if path is not None and not path.parent.is_dir():
            raise DataError(f"{path} cannot be written: there is no folder {path.parent}; create it first")
