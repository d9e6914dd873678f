"""Why no allocation meets a budget: each quantity's minimum, and the layers that hold it up.

    hold_l = use(l at its lowest allowed widths) - use(l at the lowest candidates)

Deliberately not done: a conflict between quantities, because the lowest widths minimise all of them together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from allocators.problem.arrays import IntArray
from allocators.problem.budget import QUANTITIES, Budget

if TYPE_CHECKING:
    from allocators.problem.cost_table import CostTable

_NAMED = 5  # layers at most


def infeasibility(table: CostTable, budget: Budget, exceeded: list[str], *, tied: bool) -> str:
    """The message for a `budget` whose `exceeded` quantities are out of reach.

    Args:
        table: the problem.
        budget: what was asked.
        exceeded: the quantities out of reach.
        tied: whether a layer's weight and its input have to share a width.
    """
    minimum = table.minimum_usage(budget, tied=tied)
    parts = []
    for quantity in exceeded:
        limit = budget.limits[quantity]
        parts.append(
            f"{quantity} {limit:.12g} is below the minimum reachable {minimum[quantity]:.12g}, "
            f"{_pins(table, budget, quantity, tied=tied)}"
        )
    return f"the budget {str(budget)!r} cannot be met: {'; '.join(parts)}; raise it, or allow these layers fewer bits"


def _pins(table: CostTable, budget: Budget, quantity: str, *, tied: bool) -> str:
    """The layers above the lowest candidate, largest contribution to `quantity` first."""
    meter = table.meter(budget)
    held = table.widths(table.lowest(tied=tied))
    free = np.where(held > 0, table.bits[0], 0)
    everything = slice(None)
    row = QUANTITIES.index(quantity)
    hold = (meter.use(everything, held[0], held[1]) - meter.use(everything, free[0], free[1]))[row]
    order = [layer for layer in np.argsort(-hold, kind="stable") if hold[layer] > 0]
    if not order:
        return f"with every layer at the lowest candidates (W{table.bits[0]}A{table.bits[0]})"
    named = [f"{table.layers[layer]} ({_widths(table, layer, held)}, +{hold[layer]:.4g})" for layer in order[:_NAMED]]
    rest = f" and {len(order) - _NAMED} more" if len(order) > _NAMED else ""
    return f"pinned by {', '.join(named)}{rest}"


def _widths(table: CostTable, layer: int, bits: IntArray) -> str:
    """Such as W8A4, L2R4 of a product's left and right input, leaving out an absent operand. bits: int64 [2, L]."""
    places = (side.places[layer] for side in table.sides)
    pairs = zip(places, bits[:, layer].tolist(), strict=True)
    return "".join(f"{place[0].upper()}{width}" for place, width in pairs if width)
