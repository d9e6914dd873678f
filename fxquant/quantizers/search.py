"""Choosing scales: activations from streamed moments, weights from a Gram matrix; exact, all candidates at once.

The Hessian-guided metric of PTQ4ViT is sum (g (O - O^))^2 over a layer's output O, g = dL/dO. Its published code takes
L = KL(p || p), whose gradient is zero up to round-off; here L is the cross-entropy against labels drawn from the
model's own output, so g g^T is the Fisher matrix and half the metric predicts the rise of the KL divergence.

- An activation error e moves output o by w_o . e. Taking errors of different inputs as uncorrelated, the metric is
  sum h e^2 with h = g^2 W^2 (elementwise squares): a weighted squared error, which the histogram evaluates exactly.
- A weight error d_o of output channel o costs b_o d_o^T G d_o with G = sum over tokens a_t x_t x_t^T, where
  g_to^2 is approximated by a_t b_o (token times channel). All candidates of a layer share G.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fxquant.graph.annotation import Candidate
from fxquant.quantizers.families import Family, Statistics
from fxquant.quantizers.uniform import UniformQuantizer

COARSE_RATIOS = tuple(np.linspace(0.3, 1.1, 9))
FINE_STEPS = (-0.075, -0.05, -0.025, 0.025, 0.05)


def search_activation(
    statistics: Statistics, family: Family, bits: Sequence[int], images: int, weighted: bool
) -> tuple[Candidate, ...]:
    """The best quantizer of one family at each width.

    weighted: choose by the Hessian-guided metric (the statistics must be weighted), else by plain squared error.
    images: how many images the statistics cover; losses are per image.
    """
    found = []
    for width in bits:
        proposals = family(statistics, width)
        plain, sensitive = statistics.moments.errors(proposals.levels, proposals.thresholds, statistics.coherence)
        # A tensor the loss does not depend on has weights of zero; it still gets the scale that fits it best.
        objective = sensitive if weighted and sensitive.any() else plain
        best = int(objective.argmin())
        loss = 0.5 * float((sensitive if weighted else plain)[best]) / images
        found.append(Candidate(width, proposals.build(best), loss, float(plain[best]), statistics.moments.signal))
    return tuple(found)


def search_weight(
    weight_oi: Tensor,
    bits: Sequence[int],
    images: int,
    gram_ii: Tensor | None = None,
    channel_weight_o: Tensor | None = None,
    *,
    search: bool = True,
) -> tuple[Candidate, ...]:
    """The best symmetric per-output-channel scales at each width.

    weight_oi: float (out, in). gram_ii: G above, float (in, in); None for plain squared error of the weight.
    channel_weight_o: b_o, float (out,). Candidates are scales relative to the one that just covers each channel: nine
    coarse ratios, then steps around each channel's best. search: False takes the covering scale.
    """
    weight = weight_oi.detach().float()
    gram = None if gram_ii is None else gram_ii.float()
    scaling = torch.ones(len(weight)) if channel_weight_o is None else channel_weight_o
    covering = weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
    signal = float(weight.double().square().sum())
    found = []
    for width in bits:
        unit = covering / (2 ** (width - 1) - 1)
        best = torch.ones(len(weight), 1)
        cost = _weight_costs(weight, best * unit, width, gram)
        for steps in (COARSE_RATIOS, FINE_STEPS) if search else ():
            centre = torch.zeros_like(best) if steps is COARSE_RATIOS else best.clone()
            for step in steps:
                ratio = centre + step
                challenger = _weight_costs(weight, ratio * unit, width, gram)
                better = challenger < cost
                cost = torch.where(better, challenger, cost)
                best = torch.where(better[:, None], ratio, best)
        quantizer = UniformQuantizer(width, best * unit)
        noise = float((quantizer(weight) - weight).double().square().sum())
        loss = 0.5 * float((cost.clamp_min(0) * scaling).double().sum()) / images
        found.append(Candidate(width, quantizer, loss, noise, signal))
    return tuple(found)


def _weight_costs(weight: Tensor, scale: Tensor, width: int, gram: Tensor | None) -> Tensor:
    """Cost of each output channel (out,) under per-channel scales (out, 1)."""
    error = UniformQuantizer(width, scale)(weight).sub_(weight)
    cost: Tensor = error.square() if gram is None else (error @ gram).mul_(error)
    return cost.sum(1)
