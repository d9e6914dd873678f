"""A streaming Gram matrix G = sum a_t x_t x_t^T, of which only one triangle is computed and kept.

G is symmetric, so blocks of rows are kept from the diagonal on: little more than half the products and half the memory
of the whole, of which a large layer alone takes tens of MiB. `matrix` writes the other half when somebody reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # rows of a block: wide enough for fast products, narrow enough to leave most of the other triangle out


class Gram:
    """Accumulates weighted rows.

    Args:
        columns: of every row.
        dtype: float32 or float64, that of the rows.
        device: where the rows are.
    """

    def __init__(
        self, columns: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        self._blocks = [
            torch.zeros(min(BLOCK, columns - at), columns - at, dtype=dtype, device=device)
            for at in range(0, columns, BLOCK)
        ]

    @classmethod
    def of(cls, matrix_ii: Tensor) -> Gram:
        """Of a whole matrix, float (in, in), symmetric; a copy of its upper triangle."""
        found = cls()
        found._blocks = [matrix_ii[at : at + BLOCK, at:].clone() for at in range(0, len(matrix_ii), BLOCK)]
        return found

    def add(self, rows_ti: Tensor, weight_t: Tensor) -> None:
        """Add a_t x_t x_t^T of each row. rows_ti: float (tokens, in); weight_t: float (tokens,), not negative."""
        weighted_it = (rows_ti * weight_t[:, None]).T
        for number, block in enumerate(self._blocks):
            at = number * BLOCK
            # Not `addmm_`, which may add to G every few hundred rows: merging what rows give must give these bits too.
            block += weighted_it[at : at + BLOCK] @ rows_ti[:, at:]

    def matrix(self) -> Tensor:
        """G, float (in, in), a tensor of its own."""
        columns = self._blocks[0].shape[1]
        whole = self._blocks[0].new_empty(columns, columns)
        for number, block in enumerate(self._blocks):
            at = number * BLOCK
            whole[at : at + BLOCK, at:] = block
            square = block[:, : len(block)]
            whole[at : at + BLOCK, at : at + BLOCK] = square.triu() + square.triu(1).T
            whole[at + BLOCK :, at : at + BLOCK] = block[:, len(block) :].T
        return whole

    def state(self) -> dict[str, Tensor]:
        """The blocks, float (rows, columns from the diagonal on), by their number."""
        return {str(number): block for number, block in enumerate(self._blocks)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state, whose tensors change from then on."""
        self._blocks = [state[str(number)] for number in range(len(state))]

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the Gram matrix of further rows, given by its state."""
        for number, block in enumerate(self._blocks):
            block += state[str(number)]
