"""CheckBudget: refuse an unreachable budget or a mistaken override before any image is touched.

Needs roles only: the least any allocation can use follows from element counts and the candidate widths. Only a latency
has to wait for AllocateBits, since digits of codes are known once scales are searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from torch.fx import GraphModule

from allocators.problem.uniform_limits import in_numbers
from allocators.problem.usage import FLOAT_BITS
from fxquant.errors import OverrideError
from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.graph.facts import ROLES_ASSIGNED, Fact
from fxquant.quantizers.families import widest_bits
from fxquant.quantizers.observers import Edge
from passes.allocate.allocate_bits import AllocateBits
from passes.pipeline.contract import Pass, PassContext
from passes.search.insert_observers import InsertObservers
from passes.search.search_scales import SearchScales

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class CheckBudget:
    """Check the budget of the AllocateBits ahead against what InsertObservers and SearchScales will offer it.

    Does nothing where they are not all ahead, as in a slice of a pipeline.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({ROLES_ASSIGNED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Change nothing; returns 0. Raises InfeasibleBudgetError or OverrideError."""
        insert, search = _first(context.ahead, InsertObservers), _first(context.ahead, SearchScales)
        allocate = _first(context.ahead, AllocateBits)
        if insert is not None and search is not None and allocate is not None:
            _check(graph_module, insert, search.bits, allocate)
        return 0


def check_budget(pipeline: Iterable[Pass], with_roles: GraphModule) -> None:
    """Refuse a budget before anything long is done. with_roles: the traced model after AssignRoles; unchanged.

    Raises InfeasibleBudgetError or OverrideError.
    """
    CheckBudget().apply(with_roles, PassContext(ahead=tuple(pipeline)))


def _first(passes: Sequence[Pass], kind: type[Kind]) -> Kind | None:
    return next((step for step in passes if isinstance(step, kind)), None)


def _check(graph_module: GraphModule, insert: InsertObservers, bits: tuple[int, ...], allocate: AllocateBits) -> None:
    annotations, elements, fixed, widest, own = [], [], [], [], []
    for node in nodes_with_role(graph_module):
        planned = insert.plan(node)
        if planned:
            annotations.append(annotation_of(node))
            quantized = [edge for _, edge, family in planned if family is not None]
            own += [len(annotations) - 1] if allocate.has_own_softmax(quantized) else []
            widest.append(min((widest_bits(f) for _, _, f in planned if f is not None), default=bits[-1]))
            elements.append(0 if not quantized or Edge.IMAGE in quantized else annotations[-1].activation_elements)
            fixed.append(allocate.image_bits if Edge.IMAGE in quantized else FLOAT_BITS)
    if allocate.image_bits in fixed and allocate.image_bits not in bits:
        raise OverrideError(
            f"image_bits={allocate.image_bits} is not among the candidate bits {bits}: choose one of these, or leave "
            f"the image in float with InsertObservers(image=None)"
        )
    nothing = [0.0] * len(bits), [0.0] * len(bits)
    nothings = [nothing] * len(annotations)
    table = allocate.table(annotations, elements, fixed, widest, bits, nothings, nothings, dict.fromkeys(own, nothing))
    budget = in_numbers(allocate.budget, table)
    if set(budget.limits) - {"latency_ms"}:
        table.check_feasible(replace(budget, latency_ms=None))
