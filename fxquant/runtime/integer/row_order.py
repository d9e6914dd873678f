"""Rows of a tensor (its last dimension) in another order: what cutting into windows, rolls and merges come to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ReorderRows(nn.Module):
    """The same permutation of rows in every image.

    Args:
        rows: int64 (n,), which of an image's n rows comes where.
        shape: sizes between batch and channels of the result.
        parts: rows that lie side by side in one row of the result.
    """

    rows: Tensor

    def __init__(self, rows: Tensor, shape: Sequence[int], parts: int = 1) -> None:
        super().__init__()
        self.shape, self.parts = tuple(shape), parts
        self.register_buffer("rows", rows)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (B, *shape, parts C), any dtype; B is what is left."""
        images = x.reshape(-1, len(self.rows), x.shape[-1])
        return images[:, self.rows].reshape(-1, *self.shape, self.parts * x.shape[-1])

    def undone_by(self, other: ReorderRows) -> bool:
        """Whether `other` puts every row back to where it came from."""
        if self.parts != 1 or other.parts != 1 or len(self.rows) != len(other.rows):
            return False
        return torch.equal(self.rows[other.rows], torch.arange(len(self.rows)))

    def extra_repr(self) -> str:
        """How many rows, and what becomes of them."""
        return f"{len(self.rows)} rows to {self.shape}" + (f", {self.parts} in one" if self.parts > 1 else "")
