"""Accuracy: counted over images, with its standard error; outputs that are no class scores are refused."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import DropPath

from fxquant.data import embedded
from fxquant.data.images import ImageData, embedded_test
from fxquant.errors import DataError, ModelError
from fxquant.measure.accuracy import Accuracy, error_of_drop, evaluate


def test_evaluation() -> None:
    data = embedded_test()
    accuracy = evaluate(embedded.load_model(), data, limit=100)
    assert accuracy.count == 100
    assert accuracy.top1 > 80
    assert (len(accuracy.right), sum(accuracy.right)) == (100, accuracy.correct)
    assert Accuracy(90, 100).standard_error == pytest.approx(3.0)
    assert str(Accuracy(1831, 2000)) == "91.55 % +/- 0.62 (1,831 of 2,000)"
    few = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 3))
    with pytest.raises(DataError, match="the model gives 3 classes"):
        evaluate(few, data, limit=20)
    with pytest.raises(ModelError, match="class scores"):
        evaluate(torch.nn.Identity(), data, limit=20)


@pytest.mark.quick
def test_the_error_of_a_drop_is_paired() -> None:
    before = [True] * 60 + [False] * 40
    assert error_of_drop(before, [before]) == 0
    changed = [False] * 5 + [True] * 58 + [False] * 37
    assert error_of_drop(before, [changed]) == pytest.approx(10 * (0.08 - 0.02**2) ** 0.5), "(5 lost, 3 gained) of 100"
    assert error_of_drop(before, [before, changed]) == pytest.approx(5 * (0.08 - 0.02**2) ** 0.5), "mean of two"


class Linear(torch.nn.Sequential):
    """Ten scores of grey images of 28 x 28, after what is given."""

    def __init__(self, *before: torch.nn.Module) -> None:
        super().__init__(*before, torch.nn.Flatten(), torch.nn.Linear(784, 10))


@pytest.mark.quick
@pytest.mark.parametrize("first", [torch.nn.Dropout(0.1), torch.nn.BatchNorm2d(1), DropPath(0.1)])
def test_a_model_in_training_mode_is_refused(first: torch.nn.Module) -> None:
    model = Linear(first)
    with pytest.raises(ModelError, match=r"0 is in training mode.*model\.eval"):
        evaluate(model, embedded_test(), limit=20)
    assert evaluate(model.eval(), embedded_test(), limit=20).count == 20
    assert evaluate(Linear(torch.nn.Dropout(0.0)), embedded_test(), limit=20).count == 20


@pytest.mark.quick
def test_scores_that_are_no_numbers_are_no_class() -> None:
    model = Linear()
    with torch.no_grad():
        model[1].bias[3] = math.nan
    with pytest.raises(ModelError, match="NaN as scores of image 0 of the embedded test images"):
        evaluate(model, embedded_test(), limit=20)


@pytest.mark.quick
@pytest.mark.parametrize(("side", "batches"), [(28, [64, 6]), (224, [27, 27, 16])])
def test_large_images_go_through_a_cpu_in_smaller_batches(side: int, batches: list[int]) -> None:
    sizes = []

    class Counted(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            return torch.eye(2)[[0] * len(images)]

    data = ImageData("images", 70, lambda index: torch.zeros(3, side, side), torch.zeros(70).long(), 2)
    assert evaluate(Counted(), data).correct == 70
    assert sizes == [1, *batches], "one image first, then batches"
    sizes.clear()
    evaluate(Counted(), data, batch_size=35)
    assert sizes == [1, 35, 35]
