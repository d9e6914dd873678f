"""Why no allocation meets a budget: each quantity's minimum, and the layers that hold it up.

    hold_l = use(l at its lowest allowed widths) - use(l at the lowest candidates)

Deliberately not done: a conflict between quantities, because the lowest widths minimise all of them together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from allocators.problem.budget import QUANTITIES, Budget

if TYPE_CHECKING:
    from allocators.problem.cost_table import CostTable

_NAMED_LAYERS = 5


def infeasibility(table: CostTable, budget: Budget, exceeded: list[str], *, tied: bool) -> str:
    """The message for a `budget` whose `exceeded` quantities are out of reach."""
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
    held = table.bits(table.lowest(tied=tied))
    free = np.where(held > 0, [[table.weight_bits[0]], [table.activation_bits[0]]], 0)
    everything = slice(None)
    row = QUANTITIES.index(quantity)
    hold = (meter.use(everything, held[0], held[1]) - meter.use(everything, free[0], free[1]))[row]
    order = [layer for layer in np.argsort(-hold, kind="stable") if hold[layer] > 0]
    if not order:
        lowest = f"W{table.weight_bits[0]}A{table.activation_bits[0]}"
        return f"with every layer at the lowest candidates ({lowest})"
    named = [
        f"{table.layers[layer]} ({_widths(held[0, layer], held[1, layer])}, +{hold[layer]:.4g})"
        for layer in order[:_NAMED_LAYERS]
    ]
    rest = f" and {len(order) - _NAMED_LAYERS} more" if len(order) > _NAMED_LAYERS else ""
    return f"pinned by {', '.join(named)}{rest}"


def _widths(weight_bits: int, activation_bits: int) -> str:
    """Such as W8A4, leaving out an absent operand."""
    return (f"W{weight_bits}" if weight_bits else "") + (f"A{activation_bits}" if activation_bits else "")
