"""CheckBudget: refuse an unreachable budget or a mistaken override before any image is touched.

Needs roles only: the least any allocation can use follows from element counts and the candidate widths. Only a latency
has to wait for AllocateBits, since digits of codes are known once scales are searched.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch.fx import GraphModule

from allocators.like_uniform import in_numbers
from allocators.meter import FLOAT_BITS
from fxquant.errors import OverrideError
from fxquant.graph.annotation import Fact, annotation_of, nodes_with_role
from fxquant.quantizers.families import widest_bits
from fxquant.quantizers.observers import Edge
from passes.allocate_bits import AllocateBits
from passes.contract import PassContext
from passes.insert_observers import InsertObservers


@dataclass(frozen=True)
class CheckBudget:
    """Check the budget of an AllocateBits against what InsertObservers will quantize at these candidate widths."""

    allocate: AllocateBits = field(repr=False)
    insert: InsertObservers = field(repr=False)
    bits: tuple[int, ...]

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ROLES_ASSIGNED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Change nothing; returns 0. Raises InfeasibleBudgetError or OverrideError."""
        image_bits = self.allocate.image_bits
        annotations, elements, fixed, widest = [], [], [], []
        for node in nodes_with_role(graph_module):
            planned = self.insert.plan(node)
            if planned:
                annotations.append(annotation_of(node))
                quantized = [edge for _, edge, family in planned if family is not None]
                widest.append(min((widest_bits(f) for _, _, f in planned if f is not None), default=self.bits[-1]))
                elements.append(0 if not quantized or Edge.IMAGE in quantized else annotations[-1].activation_elements)
                fixed.append(image_bits if Edge.IMAGE in quantized else FLOAT_BITS)
        if image_bits in fixed and image_bits not in self.bits:
            raise OverrideError(
                f"image_bits={image_bits} is not among the candidate bits {self.bits}: choose one of these, or leave "
                f"the image in float with InsertObservers(image=None)"
            )
        nothing = [([0.0] * len(self.bits), [0.0] * len(self.bits))] * len(annotations)
        table = self.allocate.table(annotations, elements, fixed, widest, self.bits, nothing, nothing)
        budget = in_numbers(self.allocate.budget, table)
        if set(budget.limits) - {"latency_ms"}:
            table.check_feasible(replace(budget, latency_ms=None))
        return 0
