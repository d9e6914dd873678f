"""Calibration images from lists and loaders; arguments of a model besides its images."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxquant
from fxquant.errors import CalibrationError, InputError, TraceError
from fxquant.graph.capture.tracing import trace
from fxquant.session.calibration_images import MOST_IMAGES, gathered
from tests.models import images, vit

pytestmark = pytest.mark.quick

IMAGES = images(6, 8)


class Once:
    """Counts how often it is gone through, and how far."""

    def __init__(self, batch: Tensor) -> None:
        self.batch, self.begun, self.given = batch, 0, 0

    def __iter__(self):
        self.begun += 1
        while True:
            self.given += 1
            yield self.batch


GIVEN = {
    "tensor": IMAGES,
    "list of images": list(IMAGES),
    "list of batches": [IMAGES[:4], IMAGES[4:]],
    "generator": (image for image in IMAGES),
    "loader": DataLoader(TensorDataset(IMAGES), batch_size=4),
    "loader with labels": DataLoader(TensorDataset(IMAGES, torch.arange(6)), batch_size=4),
    "loader of lists of images": DataLoader(list(IMAGES), batch_size=4, collate_fn=list),
    "loader of dicts": DataLoader([{"pixel_values": image, "labels": 1} for image in IMAGES], batch_size=4),
}


@pytest.mark.parametrize("name", GIVEN)
def test_images_come_in_order_from_whatever_holds_them(name) -> None:
    assert torch.equal(gathered(GIVEN[name]), IMAGES)


def test_images_with_gradients_have_none() -> None:
    given = IMAGES.clone().requires_grad_()
    assert not gathered(given).requires_grad
    assert not gathered([given]).requires_grad


def test_an_endless_loader_is_left_when_it_has_given_too_many() -> None:
    loader = Once(torch.zeros(100, 3, 1, 1))
    with pytest.raises(CalibrationError, match=r"over 1024 images or 1 GiB.*itertools\.islice\(loader, 1\)"):
        gathered(loader)
    assert (loader.begun, loader.given) == (1, 1 + MOST_IMAGES // 100)


def broken():
    yield IMAGES[0]
    raise OSError("no such file")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("images", "not a str"),
        (3, "not a int"),
        (IMAGES.numpy(), "not a ndarray"),
        ({"images": IMAGES}, "not a dict"),
        ([], "gives nothing"),
        ([IMAGES, torch.arange(6)], r"item 1 is a tensor of shape \(6,\)"),
        ([IMAGES, None], "item 1 is a NoneType"),
        ([IMAGES, images(1, 16)], r"item 1 has images of shape \(3, 16, 16\)"),
        ([IMAGES, IMAGES.double()], "item 1 has images of .*float64"),
        ([{"pictures": IMAGES}], "item 0 is a NoneType"),
        (broken(), "item 1 cannot be read: OSError: no such file"),
    ],
)
def test_what_holds_no_images_is_refused_with_the_item(given, message) -> None:
    with pytest.raises(CalibrationError, match=message):
        gathered(given)


def test_a_session_takes_a_loader() -> None:
    loader = DataLoader(TensorDataset(images(8), torch.arange(8)), batch_size=2)
    session = fxquant.Session(vit(depth=1), itertools.islice(loader, 2))
    assert torch.equal(session.calibration, images(8)[:4])


class Asks(nn.Module):
    """A model with arguments besides its images."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(depth=1)

    def forward(self, image: Tensor, mask: Tensor | None, *, scale: float, both: bool = False) -> Any:
        tokens = self.vit.forward_features(image)
        tokens = tokens if mask is None else tokens * mask[None, :, None]
        scores = self.vit.forward_head(tokens) * scale
        return (scores, tokens) if both else scores


MASK = torch.tensor([1.0, 1, 0, 1, 1])


def test_inputs_have_their_value_in_whatever_is_made_of_the_model() -> None:
    model, inputs = Asks().eval(), {"mask": MASK, "scale": 2.0, "both": True}
    compiled = fxquant.compile(model, "W8A8", calibration=images(4), recipe="naive_min_max", inputs=inputs)
    wanted, found = model(images(4), **inputs), compiled(images(4))
    assert type(found) is tuple
    for one, other in zip(found, wanted, strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.99


def test_images_are_taken_by_the_name_that_the_model_has_for_them(tmp_path: Path) -> None:
    inputs, x = {"mask": MASK, "scale": 2.0}, images(3)
    model = fxquant.compile(Asks().eval(), "W8A8", calibration=images(2), recipe="naive_min_max", inputs=inputs)
    model.save(tmp_path / "model.fxq")
    for each in (model, fxquant.load(tmp_path / "model.fxq"), model.lowered("cpu-native")):
        assert torch.equal(each(image=x), each(x))
    for arguments, named in (((), {"x": x}), ((x,), {"image": x}), ((), {"image": x, "scale": 2.0})):
        with pytest.raises(InputError, match=r"or as 'image', and was given '.*inputs=") as error:
            model(*arguments, **named)
        assert isinstance(error.value, TypeError)
    with pytest.raises(InputError, match="the model takes images, a tensor"):
        model()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"needs 3 arguments \(image, mask, scale\): give those.*inputs=\{'mask': \.\.\., 'scale': \.\.\.\}"),
        ({"mask": None}, r"needs 2 arguments \(image, scale\)"),
        ({"mask": None, "scale": 1.0, "size": 3}, "takes no 'size'; it takes image, mask, scale, both"),
        ({"image": MASK, "mask": None, "scale": 1.0}, "'image' of Asks.forward stands for the images"),
    ],
)
def test_arguments_that_are_missing_or_unknown_are_refused(inputs, message) -> None:
    with pytest.raises(TraceError, match=message):
        trace(Asks(), images(2), inputs=inputs)
