"""Accuracy: counted over images, with its standard error; outputs that are no class scores are refused."""

from __future__ import annotations

import pytest
import torch

from fxquant.data import embedded
from fxquant.data.images import embedded_test
from fxquant.errors import DataError, ModelError
from fxquant.measure.accuracy import Accuracy, evaluate


def test_evaluation() -> None:
    data = embedded_test()
    accuracy = evaluate(embedded.load_model(), data, limit=100)
    assert accuracy.count == 100
    assert accuracy.top1 > 80
    assert Accuracy(90, 100).standard_error == pytest.approx(3.0)
    assert str(Accuracy(1831, 2000)) == "91.55 % +/- 0.62 (1,831 of 2,000)"
    few = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 3))
    with pytest.raises(DataError, match="the model gives 3 classes"):
        evaluate(few, data, limit=20)
    with pytest.raises(ModelError, match="class scores"):
        evaluate(torch.nn.Identity(), data, limit=20)
