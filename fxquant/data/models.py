"""Models by name with weights from a local file; nothing is downloaded.

A name is timm's, "embedded", or has a prefix that says where the model comes from (`fxquant.data.model_sources`). Files
of timm's architectures are read as timm reads them: where a file has other names than the model, the architecture's own
`checkpoint_filter_fn` translates them, and a .npz of JAX goes through the model's `load_pretrained`.
"""

from __future__ import annotations

import difflib
import json
import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fxquant.checks.hints import checked
from fxquant.data import embedded
from fxquant.data.model_sources import from_source, has_source, same_random_weights
from fxquant.data.preprocessing import EMBEDDED, Preprocessing
from fxquant.errors import DataError, ModelError

EMBEDDED_NAME = "embedded"
RANDOM = "random"
_MOST_CLASSES = 10_000_000
_OF_WEIGHTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


@dataclass(frozen=True)
class NamedModel:
    """A model in eval mode, where its weights come from (a file's name, "embedded" or "random") and what it eats.

    Args:
        model: the model, in inference mode.
        name: the model's name, as the user gave it.
        weights: where they come from: a file's name, "embedded" or "random".
        preprocessing: how a picture becomes the model's input.
    """

    model: nn.Module
    name: str
    weights: str
    preprocessing: Preprocessing

    @property
    def is_random(self) -> bool:
        """Whether nobody trained these weights, so that accuracy means nothing."""
        return self.weights == RANDOM

    @property
    def card(self) -> dict[str, Any]:
        """Entries for the protocol card."""
        return {"model": self.name, "weights": self.weights, "preprocessing": self.preprocessing.to_dict()}


@checked(ModelError, weights=DataError)
def load_model(
    name: str, weights: str | PathLike[str] | None = None, num_classes: int | None = None, **options: Any
) -> NamedModel:
    """The model of a name, with its weights.

    Args:
        name: timm's name of an architecture, "embedded", "hf:FOLDER", "torchvision:NAME", "open_clip:NAME" or
            "module:factory".
        weights: .safetensors, or a state dict saved by torch.save (read without running code); None leaves them random.
            They must fit exactly.
        num_classes: for whatever builds the model, such as `timm.create_model`; None: as it is there.
        **options: further options of that, such as img_size and in_chans.

    Raises ModelError for an unknown name or option and for weights that do not fit, DataError for an unreadable file,
    MissingExtraError without the package that a prefix needs.
    """
    if name == EMBEDDED_NAME:
        if num_classes is not None or options:
            raise ModelError("the embedded model is what it is: it takes no num_classes and no other options")
        if weights is None:
            return NamedModel(embedded.load_model(), name, EMBEDDED_NAME, EMBEDDED)
    model, preprocessing, has_weights = _built(name, num_classes, options)
    if weights is None:
        return NamedModel(model.eval(), name, name if has_weights else RANDOM, preprocessing)
    load_weights(model, weights)
    return NamedModel(model.eval(), name, Path(weights).name, preprocessing)


def _built(name: str, num_classes: int | None, options: Mapping[str, Any]) -> tuple[nn.Module, Preprocessing, bool]:
    """The model of a name, how its images are preprocessed, and whether it came with weights of its own."""
    if has_source(name):
        return from_source(name, {**options, **({} if num_classes is None else {"num_classes": num_classes})})
    if name == EMBEDDED_NAME:
        return embedded.build(), EMBEDDED, False
    model = _create(name, num_classes, options)
    return model, Preprocessing.of(model), False


def _create(name: str, num_classes: int | None, options: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*timm.list_models(), EMBEDDED_NAME], n=4)
        raise ModelError(f"no timm model is called {name!r}; close names: {', '.join(close) or 'none'}")
    if others := [option for option in options if option in _OF_WEIGHTS]:
        raise ModelError(f"{others[0]} brings other weights, from the network or unpickled: give a file as weights")
    if num_classes is not None and not 1 <= num_classes <= _MOST_CLASSES:
        raise ModelError(f"num_classes is from 1 to {_MOST_CLASSES:,}, not {num_classes}")
    given = {**options, **({} if num_classes is None else {"num_classes": num_classes})}
    try:
        with same_random_weights():
            model: nn.Module = timm.create_model(name, pretrained=False, **given)
    except Exception as error:  # whatever a constructor raises for an option it does not take
        raise ModelError(f"{name} cannot be built with {given}: {error}") from error
    return model


@checked(ModelError, file=DataError)
def load_weights(model: nn.Module, file: str | PathLike[str]) -> None:
    """Put a file's tensors into the model, strictly. Raises DataError or ModelError naming the first five misfits."""
    if Path(file).suffix == ".npz":
        _load_jax(model, file)
        return
    state = read_state(file)
    found = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if len(found) < len(state):
        raise DataError(f"weights {file} have a name twice, with 'module.' before it and without")
    expected = model.state_dict()
    if found.keys() != expected.keys():
        found = _translated(model, found)
    misfits = [f"{key} is missing" for key in expected if key not in found]
    misfits += [f"{key} is not in the model" for key in found if key not in expected]
    misfits += [
        f"{key} is {tuple(found[key].shape)} in the file and {tuple(tensor.shape)} in the model"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    misfits += [
        f"{key} is {_described(found[key])} in the file and {_described(tensor)} in the model"
        for key, tensor in expected.items()
        if key in found and _kind(found[key]) != _kind(tensor)
    ]
    if misfits:
        more = f", and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise ModelError(
            f"{file} does not fit the model: {'; '.join(misfits[:5])}{more}. Check the model's name and num_classes"
        )
    try:
        model.load_state_dict(found)
    except RuntimeError as error:  # modules may take states in ways of their own
        raise ModelError(f"{file} does not fit the model: {error}") from error


def _translated(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the names that timm's architecture has for it, where it knows others; else as it is."""
    translate = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if translate is None or not type(model).__module__.startswith("timm."):
        return state
    try:
        found = translate(dict(state), model)
    except Exception:  # it is meant for states of this architecture, and this may be none
        return state
    is_state = isinstance(found, dict) and all(isinstance(tensor, Tensor) for tensor in found.values())
    return dict(found) if is_state else state


def _load_jax(model: nn.Module, file: str | PathLike[str]) -> None:
    """Weights of JAX, by timm's own loader for them."""
    if not os.path.isfile(file):
        raise DataError(f"weights {file} are not there, or not a file")
    load = getattr(model, "load_pretrained", None)
    if load is None:
        raise ModelError(f"{type(model).__name__} reads no .npz: convert {file} to safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load(os.fspath(file))
    except Exception as error:  # whatever numpy and timm raise for other files
        raise ModelError(f"{file} does not fit the model: {_first_line(error)}; check the model's name") from error
    if all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()):
        raise ModelError(f"{file} has nothing that the model takes; check the model's name")


def _kind(tensor: Tensor) -> str:
    """What cannot be turned into something else without loss: "float", "complex", "bool", "int", or no plain tensor."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        return "no plain tensor"
    if tensor.is_floating_point() or tensor.is_complex():
        return "complex" if tensor.is_complex() else "float"
    return "bool" if tensor.dtype is torch.bool else "int"


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype}".removeprefix("torch.") + (" without values" if tensor.is_meta else "")


@checked(DataError)
def read_state(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name from .safetensors or a torch state dict, also one under "state_dict" or "model".

    Raises DataError.
    """
    file = Path(path)
    if not os.path.isfile(file):  # False, not an OSError, for names the system refuses
        raise DataError(f"weights {file} are not there, or not a file")
    try:
        if file.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(file)
            return tensors
        content = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise DataError(f"weights {file} are not a whole safetensors file: {error}") from error
    except Exception as error:  # torch.load raises whatever the bytes provoke
        is_other = isinstance(error, pickle.UnpicklingError)
        reason = "it holds other Python objects, or is no file of torch" if is_other else _first_line(error)
        raise DataError(
            f"weights {file} cannot be read as a state dict of plain tensors: {reason}; nothing is unpickled, so save "
            "one with torch.save(model.state_dict(), path)"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    ):
        raise DataError(f"weights {file} hold no state dict: save one with torch.save(model.state_dict(), path)")
    return dict(content)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def parse_option(text: str) -> tuple[str, Any]:
    """`img_size=96` as ("img_size", 96); values are JSON where they can be, else text. Raises ModelError."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ModelError(f"a model option reads name=value, such as img_size=96; found {text!r}")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value
