"""What a quantized model is called with: refused by a typed error, or right, whichever backend runs it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant.errors import FxQuantError, InputError
from fxquant.runtime.border import Border
from fxquant.runtime.native import library
from passes.pipeline.journal import Journal
from tests.quantized_by_hand import SmallNet, quantize_by_hand

pytestmark = pytest.mark.quick

BACKENDS = [
    "simulated",
    *(["cpu-native"] if library.why_absent() is None else []),
    *(["cpu-onednn"] if torch.cpu._is_vnni_supported() else []),
]


@pytest.fixture(scope="module")
def simulated() -> fxquant.Compiled:
    graph_module = quantize_by_hand(SmallNet(), (3, 8, 8), 6, 6)
    return fxquant.Compiled(graph_module, None, Journal(), [], {})


@pytest.fixture(scope="module", params=BACKENDS)
def model(simulated: fxquant.Compiled, request: pytest.FixtureRequest) -> fxquant.Compiled:
    return simulated if request.param == "simulated" else simulated.lowered(request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 8, 8)


REFUSED: dict[str, tuple[Any, str]] = {
    "one image without a batch": (torch.zeros(3, 8, 8), r"add the batch, images\[None\]"),
    "another size": (torch.zeros(2, 3, 16, 16), "resize the images"),
    "other channels": (torch.zeros(2, 1, 8, 8), r"the model takes a tensor \(B, 3, 8, 8\)"),
    "channels last": (torch.zeros(2, 8, 8, 3), "images have shape"),
    "half": (torch.zeros(1, 3, 8, 8).half(), r"images are torch\.float16"),
    "double": (torch.zeros(1, 3, 8, 8).double(), r"images\.to\(torch\.float32\)"),
    "bytes": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "preprocess them as for calibration"),
    "complex": (torch.zeros(1, 3, 8, 8, dtype=torch.complex64), r"images are torch\.complex64"),
    "sparse": (torch.zeros(1, 3, 8, 8).to_sparse(), "to_dense"),
    "on another device": (torch.zeros(1, 3, 8, 8, device="meta"), "images are on meta, and the model is on cpu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_images_are_refused(model: fxquant.Compiled, name: str) -> None:
    images, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason):
        model(images)


@pytest.mark.parametrize(
    "images", [None, 3, "images", [[0.0]], torch.zeros(1, 3, 8, 8).numpy()], ids=lambda i: type(i).__name__
)
def test_what_is_no_tensor_is_a_type_error(model: fxquant.Compiled, images: Any) -> None:
    with pytest.raises(InputError, match="the model takes images, a tensor") as error:
        model(images)
    assert isinstance(error.value, TypeError)


def test_any_memory_format_and_gradients_give_the_same(model: fxquant.Compiled, x: Tensor) -> None:
    expected = model(x)
    assert torch.equal(model(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(model(x.mT.contiguous().mT), expected)
    assert torch.equal(model(x.repeat(2, 1, 1, 1)[::2][[0, 2]]), expected[[0, 0]])
    assert torch.equal(model(x.clone().requires_grad_()), expected)


def test_an_image_that_is_not_finite_has_no_scores_and_the_others_keep_theirs(
    model: fxquant.Compiled, x: Tensor
) -> None:
    expected, bad = model(x), x.clone()
    bad[1, 0, 3, 3], bad[2, 2, 0, 0] = torch.nan, -torch.inf
    scores = model(bad)
    assert torch.isnan(scores).all(1).tolist() == [False, True, True, False]
    assert torch.equal(scores[[0, 3]], expected[[0, 3]])
    assert torch.isnan(model(bad[1:2])).all()
    assert torch.isnan(bad).sum() == 1, "the caller's images stay as they are"


def test_images_whose_sum_overflows_are_finite(model: fxquant.Compiled, x: Tensor) -> None:
    huge = x.clone()
    huge[1] = 3e38
    scores = model(huge)
    assert torch.isfinite(scores).all()
    assert torch.equal(scores[[0, 2, 3]], model(x)[[0, 2, 3]])


def test_no_images_have_no_scores(model: fxquant.Compiled, x: Tensor) -> None:
    scores = model(x[:0])
    assert (scores.shape, scores.dtype) == ((0, 3), torch.float32)


def test_graphs_themselves_take_no_images(model: fxquant.Compiled, x: Tensor) -> None:
    assert model.graph_module(x[:0]).shape == (0, 3)


def test_it_stays_in_inference_mode_and_in_its_dtype(model: fxquant.Compiled, x: Tensor) -> None:
    expected = model(x)
    changed = copy.deepcopy(model).train().float().cpu().to(memory_format=torch.channels_last)
    assert not any(module.training for module in changed.modules())
    assert torch.equal(changed(x), expected)
    for change in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(FxQuantError, match=r"computes in torch\.float32"):
            torch.nn.Sequential(changed).to(change)
    with pytest.raises(FxQuantError, match="cannot be moved to meta"):
        changed.to("meta")
    assert torch.equal(changed(x), expected)


def test_looking_at_pixels_wakes_none_of_torchs_own_threads() -> None:
    """They look for more to do for milliseconds, while the kernels' threads want the processors."""
    found: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "sum" in str(func):
                found.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    border = Border((3, 128, 128), torch.float32, (True,), (False,), ())
    images = torch.rand(2, 3, 128, 128)
    with Sizes():
        border.run(lambda x: x, images, None)
    assert sum(found) == images.numel()
    assert max(found) < 32_768  # at::internal::GRAIN_SIZE
    for value in (torch.nan, torch.inf):
        images[1, 2, 127, 127] = value
        assert border.run(lambda x: x, images, None).isnan().flatten(1).all(1).tolist() == [False, True]
