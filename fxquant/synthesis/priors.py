"""What makes noise look like an image to a Vision Transformer: diverse patch similarities, and limited variation.

    H = - integral f log f,   f(t) = mean over patch pairs i < j of N(t; cos(o_i, o_j), h^2)

the differential entropy of a kernel density of the cosine similarities between patches in an attention's output o
(PSAQ-ViT, equations 5 to 8). Noise has one similarity for all pairs; an image has foreground and background, hence
high entropy. Pairs are binned linearly on a grid finer than the bandwidth, so the density of M pairs on G points is
one scatter and one (G, G) product instead of M x G exponentials; gradients reach the similarities through the bins'
shares. The paper's code takes 10 grid points between the extremes, with the diagonal's ones among the pairs; here the
grid resolves the bandwidth, and a patch is not compared with itself.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

BANDWIDTH = 0.01
_BINS_PER_BANDWIDTH = 2
_FLOOR = 1e-4  # density below which log f is cut, as in the paper's code
_REACH = 4  # the grid goes on for so many bandwidths beyond the similarities -1 and 1


def similarity_entropy(output: Tensor, prefix_tokens: int = 0, bandwidth: float = BANDWIDTH) -> Tensor:
    """H of every image or window, float (B,), in nats.

    Args:
        output: of an attention, float (B, heads, tokens, channels) or (B, tokens, channels), at least three tokens
            after the first `prefix_tokens` (class token, registers) are left out. All heads' channels together describe
            a patch.
        prefix_tokens: how many tokens stand before the patches and are left out: class token, registers.
        bandwidth: the width h of the kernel that the density is estimated with.
    """
    patches = output.transpose(1, 2).flatten(2) if output.ndim == 4 else output
    patches = functional.normalize(patches[:, prefix_tokens:].float(), dim=-1)
    similarity = patches @ patches.transpose(1, 2)
    first, second = _pairs(similarity.shape[1])
    return density_entropy(similarity[:, first, second].clamp(-1, 1), bandwidth)


def density_entropy(values: Tensor, bandwidth: float = BANDWIDTH) -> Tensor:
    """Differential entropy, float (B,), in nats, of the Gaussian kernel density of values (B, M) in -1..1."""
    kernel, step = _kernel(bandwidth)
    position = (values + 1 + _REACH * bandwidth) / step
    lower = position.detach().floor().long().clamp(0, len(kernel) - 2)
    share = position - lower
    bins = values.new_zeros(len(values), len(kernel))
    bins = bins.scatter_add(1, lower, 1 - share).scatter_add(1, lower + 1, share) / values.shape[1]
    density = bins @ kernel.to(values)
    return -(density * torch.log(density + _FLOOR)).sum(1) * step


@functools.lru_cache(maxsize=8)
def _pairs(tokens: int) -> tuple[Tensor, Tensor]:
    found = torch.triu_indices(tokens, tokens, 1)
    return found[0], found[1]


@functools.lru_cache(maxsize=8)
def _kernel(bandwidth: float) -> tuple[Tensor, float]:
    """N(g_i; g_j, h^2) for all grid points, float32 (G, G), and the grid's step."""
    step = bandwidth / _BINS_PER_BANDWIDTH
    grid = torch.arange(math.ceil((2 + 2 * _REACH * bandwidth) / step) + 1, dtype=torch.float64) * step
    distance = (grid[:, None] - grid) / bandwidth
    return (torch.exp(-0.5 * distance.square()) / (bandwidth * math.sqrt(2 * math.pi))).float(), step


def variation(images_bchw: Tensor) -> Tensor:
    """Root mean square difference of neighbours, averaged over right, down and both diagonals: float (B,)."""
    x = images_bchw
    differences = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return torch.stack([d.square().flatten(1).mean(1).add(1e-12).sqrt() for d in differences]).mean(0)
