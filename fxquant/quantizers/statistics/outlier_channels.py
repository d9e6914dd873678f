"""Powers of two that make channels alike: O-2SF (TSPTQ-ViT; k = 4 as in MPTQ-ViT), and FQ-ViT's PTF."""

from __future__ import annotations

import torch


def outlier_factors(channel_magnitude: torch.Tensor, clusters: int = 4) -> torch.Tensor:
    """O-2SF: group channels by largest magnitude (1-D k-means), and give each group a power of two.

    channel_magnitude: float (channels,). Returns float32 (channels,): 1 for the group of smallest magnitude, and
    2^round(log2(centre / smallest centre)) for the others.
    """
    # On the host: these are few numbers, and many short steps.
    magnitude = channel_magnitude.double().cpu().clamp_min(1e-12)
    centres = torch.quantile(magnitude, torch.linspace(0, 1, clusters, dtype=torch.float64))
    for _ in range(100):
        nearest = (magnitude[:, None] - centres).abs().argmin(1)
        moved = torch.stack(
            [magnitude[nearest == k].mean() if (nearest == k).any() else centres[k] for k in range(clusters)]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    shift = torch.log2(centres / centres.min()).round()
    return torch.exp2(shift[nearest]).float().to(channel_magnitude.device)


def power_of_two_factors(channel_magnitude: torch.Tensor, largest: int = 3) -> torch.Tensor:
    """PTF: the least 2^a, a from 0 to `largest` (FQ-ViT's K), with which a channel is covered, relative to the largest.

    channel_magnitude: float (channels,). Returns float32 (channels,). The paper tries every a for the least squared
    error of the channel, which in general is the least that covers it.
    """
    magnitude = channel_magnitude.double().clamp_min(1e-12)
    shift = torch.log2(magnitude / magnitude.max()) + largest
    return torch.exp2(shift.ceil().clamp(0, largest)).float()
