"""Whatever modes of torch a caller is in: a model is made, kept, lowered and run alike, and the modes stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.checks.torch_modes import usual
from tests.models import compiled, images, vit

X = images(4)


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def elsewhere() -> Iterator[None]:
    """New tensors are on another device: on meta, where what is made by mistake has no values."""
    with torch.device("meta"):
        yield
        assert torch.get_default_device() == torch.device("meta")


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield
        assert torch.is_autocast_enabled("cpu")


@contextmanager
def coarse() -> Iterator[None]:
    """Products of float32 may be of bfloat16, and are on processors that have them."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


Mode = Callable[[], AbstractContextManager[None]]
MODES = pytest.mark.parametrize("mode", [float64, elsewhere, autocast])


@MODES
def test_a_model_runs_is_kept_and_is_lowered_in_any_mode(mode: Mode, tmp_path: Path) -> None:
    model = compiled("vit", "W4A4")
    expected, lowered = model(X), model.lowered("cpu-native")(X)
    with mode():
        found = model(X)
        model.save(tmp_path / "model.fxq")
        loaded = fxquant.load(tmp_path / "model.fxq")
        integers = loaded.lowered("cpu-native")
        assert loaded.check_answers() == 0
        loaded.load_state_dict(model.state_dict())
        of_loaded, of_integers = loaded(X), integers(X)
    assert torch.equal(found, expected)
    assert torch.equal(of_loaded, expected)
    assert torch.equal(of_integers, lowered)
    assert loaded.answers is not None
    assert loaded.answers.simulated.equal(loaded.graph_module(loaded.answers.images_for(loaded.graph_module)))


@pytest.mark.parametrize("mode", [float64, autocast, coarse])
def test_a_model_is_compiled_in_any_mode(mode: Mode) -> None:
    model, options = vit(depth=1), {"recipe": "naive_min_max", "bits": (4, 8)}
    expected = fxquant.compile(model, "W4A4", calibration=X, **options)(X)
    losses = fxquant.frontier(model, X, limits=[4], realised="divergence", **options).realised
    with mode():
        found = fxquant.compile(model, "W4A4", calibration=X, **options)
        measured = fxquant.frontier(model, X, limits=[4], realised="divergence", **options).realised
    assert torch.equal(found(X), expected)
    assert measured == losses


def test_modes_inside() -> None:
    with float64(), elsewhere(), autocast(), coarse(), torch.inference_mode(), usual():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert (torch.zeros(1).dtype, torch.zeros(1).device) == (torch.float32, torch.device("cpu"))
