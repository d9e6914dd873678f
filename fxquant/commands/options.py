"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allocators import ALLOCATORS, allocator_named
from fxquant.commands.texts import parse_numbers
from fxquant.errors import ArtefactError, DataError, ModelError
from passes.lower.backends import backend_names
from passes.options import RECIPE_NAMES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from allocators.allocator import Allocator
    from fxquant.data.images import ImageData
    from fxquant.data.models import NamedModel
    from fxquant.data.preprocessing import Preprocessing
    from fxquant.synthesis.pictures import Synthesis


_MODEL, _IMAGES, _PIXELS, QUANTIZATION, _CACHE = "Model", "Images", "Preprocessing", "Quantization", "Cache"
"""Under which headings `--help` lists options; what a command writes, and --json, come first without one."""

Json = Annotated[bool, typer.Option("--json", help="Pure JSON on stdout; everything else goes to stderr.")]
Model = Annotated[
    str,
    typer.Argument(
        help='A timm architecture, "embedded", hf:FOLDER, torchvision:NAME, open_clip:NAME or module:factory.'
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Local .safetensors or state dict; without it weights are random.", rich_help_panel=_MODEL),
]
NumClasses = Annotated[int | None, typer.Option(help="Classes of the model's head.", rich_help_panel=_MODEL)]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-option", help="name=value for timm.create_model, such as img_size=96.", rich_help_panel=_MODEL
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Folder or .npz of images, no labels; else made from the model alone.", rich_help_panel=_IMAGES),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Class folders, a folder with --labels, or .npz with labels; the embedded model has its own.",
        rich_help_panel=_IMAGES,
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="Names of the model's classes, one a line in the order of its outputs, or JSON; for --data.",
        rich_help_panel=_IMAGES,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="The class of every image in --data: 'path label' a line, or .csv; number or name.",
        rich_help_panel=_IMAGES,
    ),
]
Images = Annotated[int, typer.Option(min=1, help="How many calibration images.", rich_help_panel=_IMAGES)]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Evaluate on this many images, evenly spread over the data.", rich_help_panel=_IMAGES),
]
STEPS_HELP = "Of each of the two stages of synthesis; 500 is the paper's, slow on a CPU."
SynthesisSteps = Annotated[int | None, typer.Option(min=1, help=STEPS_HELP, rich_help_panel=_IMAGES)]
RECIPE_HELP = f"{', '.join(RECIPE_NAMES)}."
Recipe = Annotated[str, typer.Option(help=RECIPE_HELP, rich_help_panel=QUANTIZATION)]
ALLOCATOR_HELP = f"{', '.join(ALLOCATORS)}; else the recipe's own."
AllocatorName = Annotated[str | None, typer.Option("--allocator", help=ALLOCATOR_HELP, rich_help_panel=QUANTIZATION)]
BACKENDS_HELP = ", ".join(backend_names())
Seed = Annotated[int, typer.Option(help="Of every random draw, and of which calibration images are taken.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per step; bounds memory.")]
ImageSize = Annotated[int | None, typer.Option(help="Height and width of the model's input.", rich_help_panel=_PIXELS)]
CropPct = Annotated[
    float | None, typer.Option(help="Share of the resized image that the centre crop keeps.", rich_help_panel=_PIXELS)
]
CropMode = Annotated[
    str | None,
    typer.Option(
        help="center: the short side is resized, ends of the long one are cropped; squash: both sides; border: the "
        "long side, on a background.",
        rich_help_panel=_PIXELS,
    ),
]
Mean = Annotated[
    str | None, typer.Option(help="Per channel, comma-separated: 0.485,0.456,0.406.", rich_help_panel=_PIXELS)
]
Std = Annotated[str | None, typer.Option(help="Per channel, comma-separated.", rich_help_panel=_PIXELS)]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder that keeps calibrated models; the user's cache folder if not given.",
        rich_help_panel=_CACHE,
    ),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Keep nothing, and use nothing kept.", rich_help_panel=_CACHE)
]
DEVICE_HELP = "Where the model is, and all is computed: cpu, cuda:0, ...; `fxquant doctor` lists what there is."
Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
Interpolation = Annotated[str | None, typer.Option(help="nearest, bilinear or bicubic.", rich_help_panel=_PIXELS)]


def allocator_or_none(name: str | None) -> Allocator | None:
    """The allocator of this name; None, the recipe's own, for None. Raises BudgetError for an unknown name."""
    return None if name is None else allocator_named(name)


def cache_folder(folder: Path | None, no_cache: bool) -> Path | None:
    """Where calibrated models are kept: the folder given, else the user's own; None for nowhere.

    Raises DataError for a folder together with no_cache, ArtefactError for a folder given that cannot be made.
    """
    from fxquant.artefact.cache import Cache, user_folder
    from fxquant.commands.console import warn

    if no_cache:
        if folder is not None:
            raise DataError("--cache says where to keep results and --no-cache says not to: give one of them")
        return None
    try:
        return Cache(folder or user_folder()).folder
    except ArtefactError as error:
        if folder is not None:
            raise
        warn(f"{error}; going on without (--cache FOLDER, or --no-cache)")
        return None


def with_options(
    preprocessing: Preprocessing,
    image_size: int | None,
    crop_pct: float | None,
    crop_mode: str | None,
    mean: str | None,
    std: str | None,
    interpolation: str | None,
) -> Preprocessing:
    """The preprocessing with what the command line says."""
    numbers = {"mean": parse_numbers(mean, "mean"), "std": parse_numbers(std, "std")}
    return preprocessing.with_options(
        image_size=image_size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, **numbers
    )


def named_model(
    name: str, weights: Path | None, num_classes: int | None, options: list[str] | None, device: str
) -> NamedModel:
    """The model, with a loud word where nobody trained it.

    Args:
        name: as `fxquant.data.models.load_model` takes it.
        weights: a file of weights; None: the model's own, or random ones.
        num_classes: classes of its head; None: as it is made.
        options: name=value, for what makes it.
        device: the name of the device that it is moved to.

    Raises OptionError where there is no such device, ModelError and DataError for the rest.
    """
    from fxquant.commands.console import warn
    from fxquant.data.models import load_model, parse_option

    place = device_of_run(device)
    given: dict[str, Any] = dict(parse_option(text) for text in options or [])
    if "num_classes" in given and num_classes is not None:
        raise ModelError("--num-classes and --model-option num_classes=... say the same: give one of them")
    num_classes = given.pop("num_classes", num_classes)
    found = load_model(name, weights, num_classes, **given)
    found.model.to(place)
    if found.is_random:
        warn(f"{name} has RANDOM weights: sizes, bits and times are real, accuracy means nothing; give --weights")
    return found


def device_of_run(name: str) -> torch.device:
    """The device of this name; the process, which is this command's own, computes float32 there as float32.

    Raises OptionError where there is none.
    """
    import torch

    from fxquant.checks.devices import device_named

    device = device_named(name)
    torch.backends.cudnn.allow_tf32 = False  # which torch has for convolutions
    return device


def labelled_images(
    path: Path | None,
    preprocessing: Preprocessing,
    is_embedded: bool,
    classes: Path | None = None,
    labels: Path | None = None,
) -> ImageData:
    """Labelled images, the embedded ones where no path is needed.

    Args:
        path: folder or .npz.
        preprocessing: what makes a model's input of a picture.
        is_embedded: whether the model is the embedded one, which has images of its own.
        classes: file of the names of the model's classes.
        labels: file of the classes of images.

    Raises DataError.
    """
    from fxquant.data.images import ImageData, embedded_test

    if path is None and not is_embedded:
        raise DataError("give labelled images: --data FOLDER or --data FILE.npz")
    if path is None:
        _check_embedded(preprocessing, "--data")
    if path is None and (classes is not None or labels is not None):
        raise DataError("--classes and --labels are about the images of --data: give them too")
    data = embedded_test() if path is None else ImageData.open(path, preprocessing, classes=classes, labels=labels)
    data.checked_labels()
    return data


def _check_embedded(preprocessing: Preprocessing, option: str) -> None:
    """Raise DataError for a preprocessing that the embedded images have not had; the option gives others."""
    from fxquant.data.preprocessing import EMBEDDED

    if preprocessing != EMBEDDED:
        raise DataError(
            "the embedded images are as the model takes them: leave out the options of preprocessing, or give images "
            f"with {option}"
        )


def synthesis(
    preprocessing: Preprocessing, count: int, steps: int | None = None, learning_rate: float | None = None
) -> Synthesis:
    """How images are made for a model that takes such pictures."""
    from fxquant.synthesis.pictures import Synthesis

    given: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate}
    return Synthesis(
        count,
        image_shape=preprocessing.input_size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        **{name: value for name, value in given.items() if value is not None},
    )


def calibration_images(
    path: Path | None,
    count: int,
    preprocessing: Preprocessing,
    seed: int,
    is_embedded: bool,
    steps: int | None = None,
) -> Tensor | Synthesis:
    """Calibration images (N, C, H, W), the embedded ones where no path is needed, else how to make them.

    steps: of the synthesis; who gives them asks for one. Raises DataError.
    """
    from fxquant.commands.console import say
    from fxquant.data import embedded
    from fxquant.data.images import load_images
    from fxquant.report.progress import RichProgress

    if path is not None and steps is not None:
        raise DataError("--calibration gives images and --synthesis-steps makes them: give one of them")
    if path is not None:
        with RichProgress() as progress:
            return load_images(path, count, preprocessing, seed, progress.track("reading images", count).advance)
    if is_embedded and steps is None:
        _check_embedded(preprocessing, "--calibration")
        return embedded.calibration_images(count)
    options = synthesis(preprocessing, count, steps)
    say(f"no calibration images are given, so they are {options.described(seed)}")
    return options
