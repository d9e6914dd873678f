"""All tests run on one thread: small models run fastest so, most of all where cores are shared."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.data import embedded
from fxquant.runtime.integer import kernel_times
from tests.models import embedded_blocks


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The command line keeps results in the user's cache folder: in tests, in one of their own."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for pages and examples, which begin alike."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def few_images(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and examples get 4 calibration images at most, and calibrate and search what another has not yet."""
    whole = embedded.calibration_images
    monkeypatch.setattr(embedded, "calibration_images", lambda count: whole(min(count, 4)))
    for name in ("compile", "Session", "frontier"):
        monkeypatch.setattr(fxquant, name, functools.partial(getattr(fxquant, name), cache=kept))


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages get the first two blocks of the embedded model: what they say holds of any depth. Kernels are timed over
    as few runs as can be."""
    monkeypatch.setattr(embedded, "load_model", functools.partial(embedded_blocks, 2, embedded.load_model))
    monkeypatch.setattr(kernel_times, "least_ms", functools.partial(kernel_times.least_ms, seconds=0.0))


@pytest.fixture(autouse=True)
def own_seed() -> None:
    """A test draws the same numbers alone, with others and on any worker."""
    torch.manual_seed(0)
