"""A cost table in short, for files: losses to five digits, ratios to a hundredth of a decibel.

What it is good for is to ask what another choice of bits would use and lose; an allocator is given the table itself.
Whoever reads one has it from somebody else: sizes and numbers are bounded before a table is made of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from allocators.problem.cost_table import CostTable
from fxquant.errors import ArtefactError, FxQuantError

_MOST_CHOICES = 8_000  # layers times widths: a frontier takes seconds at most
_WIDEST, _WIDEST_FIXED, _LARGEST, _LOUDEST_DB = 16, 32, 1e30, 300.0


def is_small(table: CostTable) -> bool:
    """Whether a file may hold it: 1,000 layers of 8 widths, at most of 16 bits."""
    return len(table.layers) * len(table.bits) <= _MOST_CHOICES and table.bits[-1] <= _WIDEST


def to_brief(table: CostTable) -> dict[str, Any]:
    """JSON values from which `from_brief` makes nearly the same table."""
    values = table.to_dict()
    values["cost"] = _rounded(table.cost)
    values["sqnr_db"] = np.round(np.clip(table.sqnr_db, -_LOUDEST_DB, _LOUDEST_DB), 2).tolist()
    values["allowed"], values["tied"] = (np.asarray(a).astype(int).tolist() for a in (table.allowed, table.tied))
    values["latency_ms"] = None if table.latency_ms is None else np.round(table.latency_ms, 6).tolist()
    return values


def _rounded(array: Any) -> list[Any]:
    """Nested lists of numbers with five digits."""
    return [_rounded(item) if isinstance(item, np.ndarray) else float(f"{item:.5g}") for item in array]


def from_brief(values: Any) -> CostTable:
    """The table. Raises ArtefactError for anything that `to_brief` does not give."""
    try:
        table = CostTable.from_dict(values)
    except (FxQuantError, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise ArtefactError(f"not a cost table: {error!s:.300}") from error
    numbers = (table.elements, table.macs, table.fixed_bits, table.cost, np.abs(table.sqnr_db))
    limits = (2**53, 2**53, _WIDEST_FIXED, _LARGEST, _LARGEST)
    is_bounded = all(bool((np.asarray(array) <= limit).all()) for array, limit in zip(numbers, limits, strict=True))
    if not (is_bounded and is_small(table)):
        raise ArtefactError("not a cost table: it has numbers, widths or layers beyond those of any model")
    return table
