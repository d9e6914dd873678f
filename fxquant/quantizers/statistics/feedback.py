"""What later columns of a weight make up for when it is rounded column by column, and what is left of each error.

With G = R R^T a layer's damped Gram matrix, R upper triangular, an error d costs |d R|^2, whose term of column j is
R_jj^2 (d_j + sum over k < j of d_k R_kj / R_jj)^2 (Chee et al., QuIP, theorem 6): the feedback R_kj / R_jj says how
column j makes up for the errors of earlier ones, and R_jj^2 what an error costs that no later column makes up for. So
a weight that is rounded with feedback costs about sum_j R_jj^2 e_j^2, with e_j the distance to the grid, where one
that is rounded to nearest costs e G e^T. `passes.correct.compensate_weights` rounds with it; the search of scales
and widths for such a weight goes by R_jj^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

WELL_DAMPED = 0.1
_TOGETHER = 256  # columns that are factored together


def column_order(gram_ii: Tensor) -> Tensor:
    """The order in which columns are rounded, int64 (in,): by their inputs' mean squares, the largest first."""
    return gram_ii.diagonal().argsort(descending=True, stable=True)


def factor(gram_ii: Tensor, dampening: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the damped G = R R^T the feedback R_kj / R_jj, (in, in), and the powers R_jj^2, (in,), in columns' order.

    The feedback is above the diagonal; below it, there are any numbers.

    Args:
        gram_ii: G, float (in, in), positive semi-definite.
        dampening: the share of the mean diagonal that is added to the diagonal.
        dtype: of the results, a type of float.
    """
    # Eigenvalues lie between the dampening and the number of columns, in means of the diagonal: well damped, float32
    # does, at half the time.
    found = gram_ii.to(torch.float32 if dampening >= WELL_DAMPED else torch.float64, copy=True)
    diagonal = found.diagonal()
    diagonal += diagonal.mean().clamp_min(1e-30) * dampening
    # Block by block from the last column to the first, in place: R_IJ R_JJ^T = G_IJ - sum over later K of R_IK R_JK^T.
    # Below the diagonal G is left, which nobody reads.
    for end in range(len(found), 0, -_TOGETHER):
        start = max(end - _TOGETHER, 0)
        above, corner = found[:start, start:end], found[start:end, start:end]
        found[:end, start:end].addmm_(found[:end, end:], found[start:end, end:].T, alpha=-1)
        # Turned round by both axes, a lower Cholesky factor is the upper triangular one that stands on the left.
        corner.copy_(torch.linalg.cholesky(corner.flip(0, 1)).flip(0, 1))
        above.copy_(torch.linalg.solve_triangular(corner.T, above, upper=False, left=False))
    powers = diagonal.square()
    return found.div_(diagonal.clone()).to(dtype), powers.to(dtype)


def powers_left(gram_ii: Tensor, dampening: float) -> Tensor:
    """R_jj^2 of every column where they are rounded in `column_order`, float32 (in,), not negative."""
    order = column_order(gram_ii)
    _, powers = factor(gram_ii[order][:, order], dampening, torch.float32)
    return powers[order.argsort()]
