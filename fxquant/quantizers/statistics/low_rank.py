"""A Gram matrix in few numbers, so that what an error costs grows with the layer and not with its width's square.

    e G e^T ~ |e F|^2 + sum_i d_i e_i^2,    F F^T = (G Q) (Q^T G Q)^+ (G Q)^T,    d = diag(G - F F^T)

Q is an orthonormal basis of G times random vectors: Nystroem's approximation (Halko, Martinsson and Tropp, 2011,
section 5.5, with one power iteration). What it leaves, G - F F^T, is positive semidefinite; of that the diagonal
counts, since rounding errors of different columns are next to uncorrelated. Directions that all together hold less than
`NEGLIGIBLE` of G's trace are left to the diagonal as well: Gram matrices weighted by gradients often have very few.
Against G itself, predicted losses of a ViT-tiny's and a DeiT-T's weights at 2 to 8 bits are equal within 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 128
NEGLIGIBLE = 0.003
_ROUNDING = 1e-7  # of the largest eigenvalue: below, float32 products have left noise only


@dataclass(frozen=True)
class LowRank:
    """factor_ir: F, float32 (in, rank), its columns by ascending norm. rest_i: d, float32 (in,), not negative."""

    factor_ir: Tensor
    rest_i: Tensor

    def cost(self, error_oi: Tensor) -> Tensor:
        """e G e^T of each row e of an error, float32 (out, in) to (out,); the error is overwritten."""
        along = (error_oi @ self.factor_ir).square_().sum(1)
        return along.addmv_(error_oi.square_(), self.rest_i)

    def strongest(self, rank: int) -> LowRank:
        """The same with at most this many directions; of the others, as of all that F leaves, the diagonal counts."""
        rest, kept = self.factor_ir[:, :-rank], self.factor_ir[:, -rank:]
        return LowRank(kept.contiguous(), self.rest_i + rest.square().sum(1)) if rest.shape[1] else self

    @classmethod
    def of(cls, gram_ii: Tensor, rank: int = RANK) -> LowRank:
        """Approximate G, float32 (in, in), symmetric and positive semidefinite; equal to it up to `rank` columns."""
        columns = len(gram_ii)
        draw = torch.randn(columns, min(rank, columns), generator=torch.Generator().manual_seed(0)).to(gram_ii.device)
        basis = torch.linalg.qr(gram_ii @ draw)[0]
        image = (gram_ii @ basis).double()
        core = basis.double().T @ image
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        share = values.clamp_min(0).cumsum(0) / values.sum().clamp_min(1e-300)
        kept = values > max(float(values[-1]) * _ROUNDING, 0.0)
        if columns > rank:
            kept &= share > NEGLIGIBLE
        factor = ((image @ vectors[:, kept]) * values[kept].rsqrt()).float()
        return cls(factor, (gram_ii.diagonal() - factor.square().sum(1)).clamp_min(0))

    @classmethod
    def identity(cls, columns: int, device: torch.device | None = None) -> LowRank:
        """G = 1: the plain squared error. device: where the error is."""
        return cls.diagonal(torch.ones(columns, device=device))

    @classmethod
    def diagonal(cls, powers_i: Tensor) -> LowRank:
        """G = diag(powers), float32 (in,), not negative."""
        return cls(torch.zeros(len(powers_i), 0, device=powers_i.device), powers_i)
