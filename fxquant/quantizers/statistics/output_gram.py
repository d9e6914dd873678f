"""What errors at the outputs of a layer cost together: a streaming Gram matrix of the loss's gradients there.

    H = mean over images of sum over tokens of E[g_t g_t^T],    g_t the gradient of v . y by the output at token t,

with v the objective's random cotangents, is the output's half of the layer's Hessian in its Kronecker form (Martens and
Grosse, 2015): errors d (out,) cost d H d^T. Its diagonal says how much the loss cares for each output; the rest, which
errors make up for one another. Outputs are looked at in groups of neighbours, `GROUP` at most: all of them together
would cost more than the backward passes.

What few images say off the diagonal is mostly noise. With H_i of N images or views of images, taken as independent, H
their mean and |.| the norm off the diagonal, all entries there are multiplied by

    1 - lambda,    lambda = (mean |H_i|^2 - |H|^2) / ((N - 1) |H|^2), at least 0 and at most 1,

the estimated share of noise in |H|^2: the shrinkage of least expected error (Ledoit and Wolf, 2004).
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 256  # outputs at most that are looked at together


class OutputGram:
    """Accumulates H_i image by image."""

    def __init__(self) -> None:
        self._sum: Tensor = torch.zeros(())
        self._squares = torch.zeros((), dtype=torch.float64)
        self._images = torch.zeros((), dtype=torch.int64)

    def add(self, gram_goo: Tensor) -> None:
        """Add H_i of one image, float (groups, outputs, outputs)."""
        squares = _off_diagonal(gram_goo).square().sum(dtype=torch.float64)
        self._sum = self._sum.to(gram_goo.device) + gram_goo
        self._squares = self._squares.to(gram_goo.device) + squares
        self._images = self._images + 1

    def matrix(self) -> Tensor:
        """H without what is estimated to be noise, float (groups, outputs, outputs)."""
        images = int(self._images)
        mean = self._sum / images
        off = _off_diagonal(mean)
        power = float(off.square().sum(dtype=torch.float64))
        noise = (float(self._squares) / images - power) / (images - 1) if images > 1 else power
        return mean - off * min(max(noise / max(power, 1e-300), 0.0), 1.0)

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return {"sum": self._sum, "squares": self._squares, "images": self._images}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        self._sum, self._squares, self._images = state["sum"], state["squares"], state["images"]

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the matrices of further images, given by their state."""
        self._sum = self._sum + state["sum"]
        self._squares = self._squares + state["squares"]
        self._images = self._images + state["images"]


def gram_of(gradient_to: Tensor) -> Tensor:
    """sum over tokens of g_t g_t^T, float (groups, outputs, outputs), in the largest groups of at most `GROUP` outputs.

    gradient_to: g, float (tokens, out).
    """
    outputs = gradient_to.shape[1]
    size = next(size for size in range(min(outputs, GROUP), 0, -1) if outputs % size == 0)
    rows_got = gradient_to.T.reshape(-1, size, len(gradient_to))
    return rows_got @ rows_got.mT


def _off_diagonal(gram_goo: Tensor) -> Tensor:
    return gram_goo - torch.diag_embed(gram_goo.diagonal(dim1=1, dim2=2))
