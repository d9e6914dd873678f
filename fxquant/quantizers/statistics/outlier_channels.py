"""Channels in groups of like magnitude, each group with a power of two: O-2SF (TSPTQ-ViT; k = 4 as in MPTQ-ViT)."""

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
