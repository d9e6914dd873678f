"""Linear layers and convolutions as one matrix product: inputs and output gradients as rows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def weight_rows(module: nn.Module, x: Tensor) -> Tensor | None:
    """The inputs as rows (tokens, in) that the flattened weight (out, in) multiplies; None for grouped convolution."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if isinstance(module, nn.Conv2d) and module.groups == 1 and not isinstance(module.padding, str):
        columns = functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return None


def gradient_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """dL/dO as rows (tokens, out)."""
    if isinstance(module, nn.Conv2d):
        return gradient.flatten(2).transpose(1, 2).reshape(-1, gradient.shape[1])
    return gradient.reshape(-1, gradient.shape[-1])
