"""Plain slow versions of what the product computes cleverly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxquant.quantizers.family import Statistics
from fxquant.quantizers.statistics.histogram import Array, Bfloat16Histogram


def to_bf16(x: Tensor) -> Tensor:
    """Float32 values that bfloat16 holds exactly, so that every value has a histogram bucket of its own."""
    return x.to(torch.bfloat16).float()


def statistics_of(x_b: Tensor, weight: Tensor | None = None) -> Statistics:
    """Statistics of a batch (B, ...) of images."""
    histogram = Bfloat16Histogram()
    histogram.update(x_b, weight)
    low = float(x_b.reshape(len(x_b), -1).amin(1).mean())
    rows = Bfloat16Histogram()
    largest = x_b.amax(-1, keepdim=True).clamp(1e-15, 1e15)
    mass = largest.square().expand_as(x_b)
    rows.update(x_b / largest, None if weight is None else weight * mass, mass)
    return Statistics(
        histogram.finish(), float(x_b.min()), float(x_b.max()), low, row_moments=rows.finish(), row_length=x_b.shape[-1]
    )


def by_table(x: Tensor, levels: Array, thresholds: Array) -> Array:
    """Each value's level: a value on a threshold takes the upper one."""
    return np.asarray(levels[np.searchsorted(thresholds, x.double().numpy(), side="right")])


def squared_error(x: Tensor, quantized: Tensor, weight: Tensor | None = None) -> float:
    error = (quantized.double() - x.double()).square()
    return float((error if weight is None else error * weight.double()).sum())
