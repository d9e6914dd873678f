"""Linear layers and convolutions as one matrix product: inputs and output gradients as rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def has_rows(module: nn.Module) -> bool:
    """Whether the module is one matrix product: a linear layer, or a convolution without groups or named padding."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.groups == 1 and not isinstance(module.padding, str)
    )


def weight_rows(module: nn.Module, x: Tensor) -> Tensor | None:
    """The inputs as rows (tokens, in) that the flattened weight (out, in) multiplies; None for grouped convolution."""
    if not has_rows(module):
        return None
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    conv: Any = module
    columns = functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def gradient_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """dL/dO as rows (tokens, out)."""
    if isinstance(module, nn.Conv2d):
        return gradient.flatten(2).transpose(1, 2).reshape(-1, gradient.shape[1])
    return gradient.reshape(-1, gradient.shape[-1])
