"""Convolutions of every geometry: as integers where a kernel can, simulated where none can, and the same either way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.facts import QUANTIZED
from fxquant.runtime.integer.lowered import IntegerConv2d
from passes.lower.lower import Lower
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from tests.lowering import needs_kernels
from tests.quantized_by_hand import quantize_by_hand

pytestmark = pytest.mark.quick

GEOMETRIES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({"kernel_size": 3}, True),
    "stride and padding that differ": ({"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}, True),
    "padding wider than the kernel": ({"kernel_size": 2, "padding": 3}, True),
    "groups": ({"kernel_size": 3, "groups": 2}, False),
    "depthwise": ({"kernel_size": 3, "groups": 4, "padding": 1}, False),
    "dilation": ({"kernel_size": 3, "dilation": (1, 2)}, False),
    "same": ({"kernel_size": 3, "padding": "same"}, False),
    "valid": ({"kernel_size": 3, "padding": "valid"}, False),
}


class Net(nn.Module):
    def __init__(self, **geometry: Any) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, **geometry), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.stem(x)).mean((2, 3)))


@needs_kernels
@pytest.mark.parametrize("name", GEOMETRIES)
def test_integers_equal_what_is_simulated(name: str) -> None:
    geometry, is_integer = GEOMETRIES[name]
    simulated = quantize_by_hand(Net(**geometry), (3, 8, 8), 6, 5)
    low = Pipeline([Lower("cpu-native")], assumes=[QUANTIZED]).run(simulated, PassContext())
    assert isinstance(low.get_submodule("conv"), IntegerConv2d) == is_integer
    x = torch.randn(5, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(low(x), simulated(x), rtol=1e-4, atol=1e-4)
        assert low(x[:0]).shape == (0, 3)
