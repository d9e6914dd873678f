"""What the page lets a reader choose: the cost table as values for its script, and the columns chosen so far.

The script adds up what `allocators.problem.usage` does: mean bits, bytes, bit operations, latency and predicted loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from allocators.allocation import Allocation
from allocators.problem.brief_table import to_brief
from allocators.problem.cost_table import CostTable
from fxquant.errors import ArtefactError
from fxquant.runtime.layer_row import LayerRow


def choices(table: CostTable, layers: Sequence[LayerRow], allocation: Allocation) -> dict[str, Any]:
    """JSON values: `table`, the brief cost table; `columns` [2, L], -1 where an operand has no choice; `pinned` [2, L];
    `names` [2, L], by which overrides know an operand; `widest` [2, L], the largest column that may be chosen; `limits`
    of the budget; `means`, how it averages.

    Args:
        table: the problem that bits were chosen from.
        layers: one row per quantized layer.
        allocation: with the budget.

    Raises ArtefactError where layers and table do not fit together.
    """
    rows = {row.layer: row for row in layers}
    count = len(table.layers)
    columns, pinned = np.full((2, count), -1), np.zeros((2, count), dtype=bool)
    for side in (0, 1):
        for index in np.flatnonzero(table.elements[side] > 0).tolist():
            row = rows.get(table.layers[index])
            operand = None if row is None else row.operands[operand_index(table, side, index, row)]
            if operand is None or operand.bits is None or operand.bits not in table.bits:
                raise ArtefactError(
                    f"the report's rows do not fit its cost table at layer {table.layers[index]!r:.200}: "
                    "was the file edited?"
                )
            columns[side, index] = table.bits.index(operand.bits)
            pinned[side, index] = operand.pinned
    # A pinned operand allows its own width alone, and any can be asked for; else up to the widest of its families.
    highest = np.where(pinned, len(table.bits) - 1, np.where(table.allowed, np.arange(len(table.bits)), -1).max(axis=2))
    budget = allocation.budget
    return {
        "table": to_brief(table),
        "columns": columns.tolist(),
        "pinned": pinned.tolist(),
        "widest": highest.tolist(),
        "names": [[table.operand(side, index) for index in range(count)] for side in (0, 1)],
        "places": [list(side.places) for side in table.sides],
        "limits": budget.limits,
        "means": [budget.weight_mean, budget.activation_mean],
    }


def operand_index(table: CostTable, side: int, layer: int, row: LayerRow) -> int:
    """Which of a layer's operands stands on this side of the table; of tied inputs one that is quantized.

    Args:
        table: the problem.
        side: 0 for a weight or a left input, 1 for an input or a right one.
        layer: the index of the layer.
        row: what the layer got.
    """
    last = len(row.operands) - 1
    if side == 0:
        return 0
    return 0 if np.asarray(table.tied)[layer] and row.operands[last].bits is None else last
