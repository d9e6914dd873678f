"""What a lowered model computes in float32 beside its layers: layer norms that nobody reads as bytes, means of tokens.

Torch rounds these as its own vectors suit it, on each processor in another way. Run by our kernels, they round alike
everywhere: a lowered model gives the same bits on all processors, and from C, where torch is not there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NormRows(nn.Module):
    """Layer norm over the last dimension, in float32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., channels) to the same."""
        result: Tensor = torch.ops.fxquant.norm(x, self.weight, self.bias, self.epsilon)
        return result


class AverageRows(nn.Module):
    """The mean of all that lies between batch and channels."""

    def forward(self, x: Tensor) -> Tensor:
        """float32 (B, ..., C) to (B, C)."""
        result: Tensor = torch.ops.fxquant.mean(x.flatten(1, -2))
        return result
