"""What one unit of squared error of an operand costs: the weights h of the Hessian-guided metric, tensor by tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

MASSIVE_RMS = 100.0


def input_weight(module: nn.Module | None, inputs: tuple[Tensor, ...], index: int, squared: Tensor) -> Tensor:
    """h of the Hessian-guided metric for input `index`: what one unit of squared error there adds to it.

    Args:
        module: a linear or convolution; None for a matmul; any other for a softmax or LayerNorm.
        inputs: of the node, float.
        index: of the input.
        squared: mean square of dL/dO of a linear, convolution or matmul; of dL/dX of a softmax or LayerNorm.

    Returns:
        float, in the input's shape.
    """
    if isinstance(module, nn.Linear):
        return squared @ module.weight.square()
    if isinstance(module, nn.Conv2d):
        # The transpose of a convolution with W^2 is that convolution's derivative, whatever its geometry.
        with torch.enable_grad():
            x = torch.zeros_like(inputs[0], requires_grad=True)
            product = functional.conv2d(
                x, module.weight.square(), None, module.stride, module.padding, module.dilation, module.groups
            )
            return torch.autograd.grad(product, x, squared)[0]
    if module is None:
        left, right = inputs[0], inputs[1]
        given = squared @ right.square().mT if index == 0 else left.square().mT @ squared
        return given.sum_to_size(inputs[index].shape)  # of one that several heads share: what all of them add
    return squared


def coherence(values: Tensor) -> float:
    """What a mean error of attention probabilities costs, relative to independent errors of the same size.

    values: V, float (..., keys, channels). Errors e of the K probabilities of a row meet V_k: independent ones add up
    to sum e_k^2 |V_k|^2, a mean error to |sum_k e V_k|^2, which is K |mean V|^2 / mean |V|^2 times as much. A table
    without a zero raises all small probabilities a little and so shifts the output by a whole mean V.
    """
    values = values.detach()
    ratio = values.mean(-2).square().mean() / values.square().mean().clamp_min(1e-30)
    return float(values.shape[-2] * ratio)


def heed_massive(x: Tensor, weight: Tensor) -> Tensor:
    """Weights h (shape of x) in which massive activations count at least the mean.

    A few activations hundreds of times larger than the rest steer later attention; the loss is flat around them, so
    the gradient calls them harmless, yet clipping one moves it by a hundred times the others' size. Massive: more than
    MASSIVE_RMS times the root mean square of x.
    """
    limit = MASSIVE_RMS * x.square().mean().sqrt()
    least, largest = torch.aminmax(x)
    if bool((least >= -limit) & (largest <= limit)):  # none is, as in most tensors
        return weight
    massive = x.abs() > limit
    return torch.where(massive, weight.clamp_min(float(weight.mean())), weight)
