"""Models that do not come from timm, by a name with a prefix; nothing is downloaded.

    hf:FOLDER               a Hugging Face folder: config.json, weights, preprocessor_config.json
    torchvision:vit_b_16    torchvision.models
    open_clip:ViT-B-32      the image tower of an open_clip model
    package.module:factory  the user's own: a function that returns a model, or a model

transformers and open_clip are imported when they are asked for; without them a MissingExtraError says what to install.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxquant.data.preprocessing import Preprocessing
from fxquant.errors import DataError, MissingExtraError, ModelError

_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_NOT_CROPPED = 384  # from this size on, ConvNext's processor squashes to the size itself, whatever its crop_pct
_OF_SHORT_SIDE = ("Bit", "CLIP", "ChineseCLIP", "ConvNext", "Levit", "MobileNet", "PoolFormer", "ViTHybrid")
"""Processors to which a size that is one number means the short side; to the others it means both sides."""
_CROP_MODES = {"shortest": "center", "squash": "squash"}  # by open_clip's names
Found = tuple[nn.Module, Preprocessing, bool]
"""A model, how a picture becomes its input, and whether it has its weights already."""


@contextmanager
def same_random_weights() -> Iterator[None]:
    """What is drawn on the CPU inside is the same every time, and the caller's random numbers go on where they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def has_source(name: str) -> bool:
    """Whether a model's name has a prefix, which no name of timm has."""
    return ":" in name


def from_source(name: str, options: Mapping[str, Any]) -> Found:
    """The model behind a name with a prefix.

    Args:
        name: the model's name with its prefix, such as hf:FOLDER; the module lists the prefixes.
        options: further arguments of the function that builds the model.

    Raises ModelError where there is no such model or it takes other options, DataError for a folder that cannot be
    read, MissingExtraError without the package.
    """
    prefix, _, rest = name.partition(":")
    try:
        with same_random_weights():
            return _SOURCES.get(prefix, _own)(name if prefix not in _SOURCES else rest, dict(options))
    except (DataError, ModelError, MissingExtraError):
        raise
    except Exception as error:  # whatever a constructor raises for an option it does not take
        shown = f" with {dict(options)}" if options else ""
        raise ModelError(
            f"{name} cannot be built{shown}: {type(error).__name__}: {error}; check its options"
        ) from error


def _needed(module: str, package: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{what} needs {package}: pip install {package}") from error


def _hugging_face(folder: str, options: dict[str, Any]) -> Found:
    """The class that config.json names, with all of its weights; of models that read texts too, the image tower."""
    if not os.path.isfile(Path(folder) / "config.json"):
        raise DataError(f"{folder} is no Hugging Face folder, it has no config.json: save one with save_pretrained")
    transformers: Any = _needed("transformers", "transformers", f"hf:{folder}")
    kind = _image_model(transformers, json.loads((Path(folder) / "config.json").read_text()), folder)
    local = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True, **options}
    model, said = kind.from_pretrained(folder, **local)
    if missing := sorted(said["missing_keys"]):
        raise DataError(
            f"{folder} lacks weights of {type(model).__name__}, which would stay random: {', '.join(missing[:5])}. "
            "Save the model that was trained with save_pretrained"
        )
    return model.float(), _processing_of(Path(folder)), True


def _image_model(transformers: Any, configuration: dict[str, Any], folder: str) -> Any:
    """The class that a configuration names; where it reads texts, its image tower, whose weights are in the folder."""
    name = str((configuration.get("architectures") or ["AutoModel"])[0])
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ModelError(
            f"{folder} is of the class {name!r}, which this version of transformers does not have, and no code of a "
            "folder is run: build the model in a function of your own, and name that, module:factory"
        )
    reads_texts = {"text_config", "vision_config"} <= configuration.keys()
    if not reads_texts or "ForImageClassification" in name:
        return kind
    family = name.partition("For")[0].removesuffix("Model")
    for tower in (f"{family}VisionModelWithProjection", f"{family}VisionModel"):
        if hasattr(transformers, tower):
            return getattr(transformers, tower)
    raise ModelError(
        f"{name} in {folder} reads texts beside images: save its image tower, such as model.vision_tower, with "
        "save_pretrained, and name that folder"
    )


def _processing_of(folder: Path) -> Preprocessing:
    """What the folder's image processor does, as far as it is resizing, cropping and normalizing.

    Raises DataError where it does anything else to the pixels, and for what cannot be read.
    """
    file = folder / "preprocessor_config.json"
    try:
        if not file.exists() and (both := folder / "processor_config.json").exists():  # of texts and images
            said: Any = json.loads(both.read_text())["image_processor"]
        else:
            said = json.loads(file.read_text())
        kind = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "")
        size = said.get("size", 224)
        whole = {"shortest_edge": size} if kind.startswith(_OF_SHORT_SIDE) else {"height": size, "width": size}
        sides = size if isinstance(size, dict) else whole
        crop = said.get("crop_size", sides) if said.get("do_center_crop") else sides
        crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
        height, width = (int(crop[side] if side in crop else crop["shortest_edge"]) for side in ("height", "width"))
        resized, is_squashed = _resized(said, sides, kind)
        is_normalized = said.get("do_normalize", True)
        prepared = Preprocessing(
            input_size=(3, height, width),
            crop_pct=min(height / resized, 1.0),
            mean=tuple(said.get("image_mean", (0.5,) * 3)) if is_normalized else (0.0,) * 3,
            std=tuple(said.get("image_std", (0.5,) * 3)) if is_normalized else (1.0,) * 3,
            interpolation=_RESAMPLE[said.get("resample", 2)],
            crop_mode="squash" if is_squashed else "center",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} does not say how images are prepared ({type(error).__name__}: {error}): save it beside the model, "
            f"AutoImageProcessor.from_pretrained(...).save_pretrained({str(folder)!r})"
        ) from error
    _check_pixels(said, file)
    return prepared


def _check_pixels(said: Any, file: Path) -> None:
    """Raise DataError where pixels become something that no mean and deviation of theirs describe."""
    others = {
        "do_flip_channel_order": bool(said.get("do_flip_channel_order")),
        "rescale_factor": abs(said.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6,
        "do_rescale": said.get("do_rescale") is False,
        "rescale_offset": bool(said.get("rescale_offset")),
    }
    if found := [name for name, is_other in others.items() if is_other]:
        raise DataError(
            f"{file} has {found[0]} = {said[found[0]]}, and images are given to a model in RGB, from 0 to 1 before "
            "they are normalized: do the rest in a module around the model, in a function of your own, and name that, "
            "module:factory"
        )


def _resized(said: Any, sides: dict[str, Any], kind: str) -> tuple[float, bool]:
    """Pixels of the height before the crop, and whether both sides are resized or the short one.

    Args:
        said: what the file has; some processors enlarge what they are told.
        sides: the size in it.
        kind: the processor's class.
    """
    if "shortest_edge" not in sides:
        return int(sides["height"]) / float(said.get("crop_pct") or 1.0), True
    edge = int(sides["shortest_edge"])
    if kind.startswith("Levit"):
        return edge * 256 / 224, False
    is_squashed = kind.startswith("ConvNext") and edge >= _NOT_CROPPED
    return (edge if is_squashed else edge / float(said.get("crop_pct") or 1.0)), is_squashed


def _torchvision(name: str, options: dict[str, Any]) -> Found:
    models: Any = _needed("torchvision.models", "torchvision", f"torchvision:{name}")
    if name not in models.list_models():
        raise ModelError(f"no torchvision model is called {name!r}: torchvision.models.list_models() has their names")
    model = models.get_model(name, weights=None, **{"weights_backbone": None, **options} if "rcnn" in name else options)
    return model, _preset(models, name, model), False


def _preset(models: Any, name: str, model: nn.Module) -> Preprocessing:
    """What torchvision's best weights of this model were evaluated with; the weights themselves are not looked for."""
    try:
        preset = models.get_model_weights(name).DEFAULT.transforms()
        side = getattr(model, "image_size", None) or preset.crop_size[0]
        share = min(preset.crop_size[0] / preset.resize_size[0], 1.0)
        mean, std = tuple(preset.mean), tuple(preset.std)
        return Preprocessing((3, side, side), share, mean, std, preset.interpolation.value)
    except (AttributeError, ValueError, TypeError):  # weights of another task say nothing of crops
        return Preprocessing.of(model)


def _open_clip(name: str, options: dict[str, Any]) -> Found:
    open_clip: Any = _needed("open_clip", "open_clip_torch", f"open_clip:{name}")
    model = open_clip.create_model(name, pretrained=None, **{"pretrained_hf": False, **options}).visual
    said = {**getattr(model, "preprocess_cfg", {}), **_open_clip_training(open_clip, name)}
    size = said.get("size", getattr(model, "image_size", 224))
    height, width = size if isinstance(size, tuple | list) else (size, size)
    mean = said.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = said.get("std") or open_clip.OPENAI_DATASET_STD
    mode = said.get("resize_mode", "shortest")
    if mode not in _CROP_MODES:
        raise DataError(
            f"open_clip:{name} resizes pictures by {mode!r}, and {', '.join(_CROP_MODES)} are known: build the model "
            "in a function of your own, module:factory"
        )
    interpolation = said.get("interpolation", "bicubic")
    how = Preprocessing((3, height, width), 1.0, tuple(mean), tuple(std), interpolation, _CROP_MODES[mode])
    return model, how, False


def _open_clip_training(open_clip: Any, name: str) -> dict[str, Any]:
    """How the weights that open_clip lists for an architecture want images; without weights it says what CLIP's do."""
    for tag in open_clip.list_pretrained_tags_by_model(name):
        said = open_clip.get_pretrained_cfg(name, tag)
        return {key: said[key] for key in ("mean", "std", "interpolation", "resize_mode") if said.get(key)}
    return {}


def _own(name: str, options: dict[str, Any]) -> Found:
    """module:factory; the module is looked for in the present folder, too."""
    module_name, _, attribute = name.partition(":")
    added = os.getcwd() not in sys.path
    if added:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(
            f"{module_name} cannot be imported ({error}): a model's name is one of timm's, hf:FOLDER, "
            f"torchvision:NAME, open_clip:NAME, or module:factory of your own"
        ) from error
    finally:
        if added:
            sys.path.remove(os.getcwd())
    factory = getattr(module, attribute, None)
    if factory is None:
        raise ModelError(f"{module_name} has no {attribute!r}: name a function in it that returns the model")
    model = factory if isinstance(factory, nn.Module) else factory(**options)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returns a {type(model).__name__}, not a torch.nn.Module: let it return the model")
    return model, Preprocessing.of(model), True


_SOURCES: dict[str, Callable[[str, dict[str, Any]], Found]] = {
    "hf": _hugging_face,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}
