"""How far outputs are from those of the float model, summed over images: what objectives measure.

    KL divergence             sum_c p_c (log p_c - log q_c),   p, q = softmax of the class scores     nats
    relative squared error    |found - wanted|^2 / |wanted|^2                                         a ratio
    cosine distance           1 - <found, wanted> / (|found| |wanted|)                                from 0 to 2

All compute in the dtype they are given: float64 where small divergences are differences of nearly equal numbers,
float32 where a network is trained by them. Which of them a model is held to: `fxquant.sensitivity.objective`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(wanted_bc: Tensor, found_bc: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(found)) summed over images, nats, float (); both class scores (B, classes)."""
    log_p, log_q = wanted_bc.log_softmax(1), found_bc.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum()


def relative_squared_error(wanted: Tensor, found: Tensor) -> Tensor:
    """|found - wanted|^2 / |wanted|^2 of every image, summed over images, float (); both (B, ...).

    Where an image's wanted values are all 0, its error is the squared one.
    """
    return ((found - wanted).flatten(1).square().sum(1) / power(wanted)).sum()


def cosine_distance(wanted_bd: Tensor, found_bd: Tensor) -> Tensor:
    """1 - cosine of the angle between wanted and found, summed over images, float (); both (B, dimensions)."""
    return (1 - torch.cosine_similarity(wanted_bd, found_bd, dim=1)).sum()


def power(values: Tensor) -> Tensor:
    """|values|^2 of every image, 1 where all its values are 0: (B, ...) to (B)."""
    found = values.flatten(1).square().sum(1)
    return torch.where(found > 0, found, 1.0)
