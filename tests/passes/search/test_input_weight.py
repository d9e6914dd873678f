"""What an error at an element costs: the squared gradient behind it, against Jacobians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.rows import gradient_rows, weight_rows
from passes.search.input_weights import heed_massive, input_weight


def test_massive_activations_count_at_least_the_mean() -> None:
    x, weight = torch.full((1, 100_000), 0.1), torch.rand(1, 100_000)
    x[0, 7], weight[0, 7] = 300.0, 0.0
    heeded = heed_massive(x, weight)
    assert heeded[0, 7] == weight.mean()
    assert torch.equal(heeded[0, 8:], weight[0, 8:])


class TestInputWeight:
    """h at an input element is sum over outputs of g^2 (d output / d input)^2."""

    @staticmethod
    def brute_force(forward: Any, x: Tensor, gradient: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(forward, x)
        weights = gradient.square().reshape(-1) @ jacobian.reshape(gradient.numel(), -1).square()
        return weights.reshape(x.shape)

    def test_linear(self) -> None:
        torch.manual_seed(0)
        layer, x, gradient = nn.Linear(5, 4), torch.randn(2, 3, 5), torch.randn(2, 3, 4)
        assert torch.allclose(
            input_weight(layer, (x,), 0, gradient.square()), self.brute_force(layer, x, gradient), rtol=1e-4, atol=1e-6
        )

    @pytest.mark.parametrize(
        "geometry",
        [
            {"kernel_size": 4, "stride": 4},
            {"kernel_size": 3, "stride": 2, "padding": 1},
            {"kernel_size": 3, "stride": 3},  # 8 is no multiple of 3: the last pixels are never read
            {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
            {"kernel_size": 3, "padding": "same"},
            {"kernel_size": 4, "padding": "same"},
            {"kernel_size": 3, "padding": "valid", "groups": 2},
        ],
    )
    def test_convolution(self, geometry: dict[str, Any]) -> None:
        torch.manual_seed(0)
        layer, x = nn.Conv2d(2, 4, **geometry), torch.randn(2, 2, 8, 8)
        gradient = torch.randn_like(layer(x))
        found = input_weight(layer, (x,), 0, gradient.square())
        assert torch.allclose(found, self.brute_force(layer, x, gradient), rtol=1e-4, atol=1e-6)
        assert not found.requires_grad

    @pytest.mark.parametrize("index", [0, 1])
    def test_matmul(self, index: int) -> None:
        torch.manual_seed(0)
        operands = [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6)]
        gradient = torch.randn(2, 3, 4, 6)

        def forward(x: Tensor) -> Tensor:
            pair = [*operands]
            pair[index] = x
            return pair[0] @ pair[1]

        found = input_weight(None, (operands[0], operands[1]), index, gradient.square())
        assert torch.allclose(found, self.brute_force(forward, operands[index], gradient), rtol=1e-4, atol=1e-5)

    def test_softmax_and_layer_norm_take_the_gradient_at_their_input(self) -> None:
        squared = torch.rand(2, 3)
        assert torch.equal(input_weight(nn.Softmax(-1), (torch.randn(2, 3),), 0, squared), squared)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 6), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 2, dilation=2, padding="valid")],
    ids=["linear", "padded convolution", "dilated convolution"],
)
def test_weight_rows_multiply_the_flattened_weight(layer: nn.Module) -> None:
    x = torch.randn(2, 7, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 7, 7)
    rows = weight_rows(layer, x)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    if rows is None:
        assert layer.padding == "valid", "no Gram matrix: the weight's own error decides"
        return
    product = rows @ layer.weight.flatten(1).T + layer.bias
    assert torch.allclose(product, gradient_rows(layer, layer(x)), atol=1e-5)
