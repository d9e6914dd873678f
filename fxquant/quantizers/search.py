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
END_STEPS = (-0.3, -0.2, -0.1, -0.05, -0.025, 0.025, 0.05, 0.1)
WIDEST_ASYMMETRIC = 7  # weight codes are int8; at 8 bits a zero-point brings nothing


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
        moments, coherence = statistics.moments, statistics.coherence
        if proposals.of_rows and statistics.row_moments is not None:
            moments, coherence = statistics.row_moments, 0.0
        plain, sensitive = moments.errors(proposals.levels, proposals.thresholds, coherence)
        # A tensor the loss does not depend on has weights of zero; it still gets the scale that fits it best.
        objective = sensitive if weighted and sensitive.any() else plain
        best = int(objective.argmin())
        loss = 0.5 * float((sensitive if weighted else plain)[best]) / images
        found.append(Candidate(width, proposals.build(best), loss, float(plain[best]), moments.signal))
    return tuple(found)


def search_weight(
    weight_oi: Tensor,
    bits: Sequence[int],
    images: int,
    gram_ii: Tensor | None = None,
    channel_weight_o: Tensor | None = None,
    *,
    search: bool = True,
    asymmetric: bool = False,
) -> tuple[Candidate, ...]:
    """The best per-output-channel scales at each width, and zero-points where they are asked for.

    weight_oi: float (out, in). gram_ii: G above, float (in, in); None for plain squared error of the weight.
    channel_weight_o: b_o, float (out,). Candidates are ranges relative to the one that just covers each channel: nine
    coarse ratios, then steps around each channel's best; asymmetric ranges then move each of their ends, twice.
    search: False takes the covering range. asymmetric: integer zero-points, up to `WIDEST_ASYMMETRIC` bits.
    """
    weight = weight_oi.detach().float()
    gram = None if gram_ii is None else gram_ii.float()
    scaling = torch.ones(len(weight)) if channel_weight_o is None else channel_weight_o
    signal = float(weight.double().square().sum())
    found = []
    for width in bits:
        covering = _covering(weight, asymmetric and width <= WIDEST_ASYMMETRIC)
        together, each = torch.ones(covering.shape[1]), torch.eye(covering.shape[1])
        best = torch.ones_like(covering)
        cost = _weight_costs(weight, _spanning(best * covering, width), gram)
        tried = [(together, FINE_STEPS), *((end, END_STEPS) for end in (*each, *each) if len(each) > 1)]
        for moved, steps in ((together, COARSE_RATIOS), *tried) if search else ():
            centre = torch.zeros_like(best) if steps is COARSE_RATIOS else best.clone()
            for step in steps:
                ratio = (centre + step * moved).clamp_min(END_STEPS[-1] / 4)
                challenger = _weight_costs(weight, _spanning(ratio * covering, width), gram)
                better = challenger < cost
                cost = torch.where(better, challenger, cost)
                best = torch.where(better[:, None], ratio, best)
        quantizer = _spanning(best * covering, width)
        noise = float((quantizer(weight) - weight).double().square().sum())
        loss = 0.5 * float((cost.clamp_min(0) * scaling).double().sum()) / images
        found.append(Candidate(width, quantizer, loss, noise, signal))
    return tuple(found)


def _covering(weight: Tensor, asymmetric: bool) -> Tensor:
    """The range of each row that just covers it: (out, 1), the largest magnitude, or (out, 2), how far below and above
    zero it reaches.
    """
    if not asymmetric:
        return weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return torch.stack([-weight.amin(1), weight.amax(1)], 1).clamp_min(1e-12)


def _spanning(range_or: Tensor, width: int) -> UniformQuantizer:
    """The quantizer of ranges as `_covering` gives them."""
    if range_or.shape[1] == 1:
        return UniformQuantizer(width, range_or / (2 ** (width - 1) - 1))
    scale = range_or.sum(1, keepdim=True) / (2**width - 1)
    return UniformQuantizer(width, scale, torch.round(range_or[:, :1] / scale))


def _weight_costs(weight: Tensor, quantizer: UniformQuantizer, gram: Tensor | None) -> Tensor:
    """Cost of each output channel (out,) under per-channel scales."""
    error = quantizer(weight).sub_(weight)
    cost: Tensor = error.square() if gram is None else (error @ gram).mul_(error)
    return cost.sum(1)
