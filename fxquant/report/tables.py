"""The report of a compiled model (being written)."""

from __future__ import annotations

from typing import Any


class Report:
    """Tables per layer and in total."""

    def __init__(self, layers: Any, allocation: Any, journal: Any, card: Any) -> None:
        self.layers, self.allocation, self.journal, self.card = layers, allocation, journal, card
