"""Sums by name that grow batch by batch, in a form that can be kept between two batches.

    sums = Sums()
    for _, batch in context.gather("relevance", sums, graph_module):
        sums.add("blocks.0.attn.qkv", ...)

A run that was killed and begun again gets from `gather` only the batches that its sums have not seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PREFIX = "sums/"  # of names in a state: all sums are one piece of it


class Sums:
    """Numbers by name, added up in float64; a name that was never added to is 0."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def __getitem__(self, name: str) -> float:
        return self._values.get(name, 0.0)

    def add(self, name: str, value: float) -> None:
        """Add to the sum of this name."""
        self._values[name] = self[name] + value

    def state(self) -> dict[str, Tensor]:
        """All sums, float64 ()."""
        return {_PREFIX + name: torch.tensor(value, dtype=torch.float64) for name, value in self._values.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        self._values = {name.removeprefix(_PREFIX): float(value) for name, value in state.items()}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the sums over further batches, given by their state."""
        for name, value in state.items():
            self.add(name.removeprefix(_PREFIX), float(value))
