"""As small and as cheap as the uniform model: Mix-QViT's "*" rows, model size and bit operations both.

    weight_bytes <= those of every layer at b bits,    bit_operations <= those of every layer at b bits

Layers that overrides pin count at their pinned width in the uniform model too; left operands that are narrowed on their
own (attention probabilities) count at b bits, so what they save can be spent.
"""

from __future__ import annotations

from dataclasses import replace

from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from fxquant.errors import OverrideError


def in_numbers(budget: Budget, table: CostTable) -> Budget:
    """The budget with `like_uniform_bits` as weight bytes and bit operations of this table; others as they are.

    A limit the budget sets itself stays where it is the lower one. Raises OverrideError for a width that is none of
    the table's candidates.
    """
    width = budget.like_uniform_bits
    if width is None:
        return budget
    if width not in table.bits:
        raise OverrideError(f"MP{width} asks for a uniform model of {width} bits; candidates are {table.bits}")
    usage = table.usage(table.uniform(width, width))
    weight_bytes, bit_operations = usage["weight_bytes"], usage["bit_operations"]
    return replace(
        budget,
        weight_bytes=min(weight_bytes, budget.weight_bytes or weight_bytes),
        bit_operations=min(bit_operations, budget.bit_operations or bit_operations),
    )
