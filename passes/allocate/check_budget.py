"""CheckBudget: refuse an unreachable budget or a mistaken override before any image is touched.

Needs a plan of operands only: the least any allocation can use follows from element counts and the candidate widths.
Only a latency has to wait for AllocateBits, since digits of codes are known once scales are searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

from torch.fx import GraphModule

from allocators.problem.uniform_limits import in_numbers
from fxquant.errors import OverrideError
from fxquant.graph.annotation import Annotation, Source, annotation_of, nodes_with_role, planned_nodes
from fxquant.graph.facts import Fact
from passes.allocate.allocate_bits import AllocateBits
from passes.pipeline.contract import Pass, PassContext
from passes.pipeline.pipeline import Pipeline
from passes.search.plan_operands import OPERANDS_PLANNED, PlanOperands
from passes.search.search_scales import SearchScales

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class CheckBudget:
    """Check a budget against what is planned. A pipeline fills in the fields from the passes that follow.

    Args:
        allocate: the AllocateBits that follows; None where there is none, as in a slice of a pipeline. Nothing is
            checked then.
        bits: the candidate widths that SearchScales will offer it.
    """

    # Not shown, as what is kept of the passes up to AllocateBits is told by how they show: it holds for every budget.
    allocate: AllocateBits | None = field(default=None, repr=False)
    bits: tuple[int, ...] = field(default=(), repr=False)

    requires: ClassVar[frozenset[Fact]] = frozenset({OPERANDS_PLANNED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def among(self, passes: Sequence[Pass]) -> CheckBudget:
        """The check of the allocation that these passes make; see `passes.pipeline.contract.Dependent`."""
        search, allocate = _first(passes, SearchScales), _first(passes, AllocateBits)
        return CheckBudget() if search is None or allocate is None else CheckBudget(allocate, search.bits)

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Change nothing; returns 0. Raises InfeasibleBudgetError or OverrideError."""
        self.check([annotation_of(node) for node in planned_nodes(graph_module)])
        return 0

    def check(self, planned: Sequence[Annotation]) -> None:
        """The same, of annotations of nodes that are to be quantized."""
        allocate, bits = self.allocate, self.bits
        if allocate is None:
            return
        inputs = [operand for annotation in planned for operand in annotation.inputs if operand.families]
        if allocate.image_bits not in bits and any(operand.source is Source.IMAGE for operand in inputs):
            raise OverrideError(
                f"image_bits={allocate.image_bits} is not among the candidate bits {bits}: choose one of these, or "
                f"leave the image in float with PlanOperands(image=None)"
            )
        table = allocate.table(planned, bits)
        budget = in_numbers(allocate.budget, table)
        if set(budget.limits) - {"latency_ms"}:
            table.check_feasible(replace(budget, latency_ms=None))


def check_budget(pipeline: Pipeline, with_roles: GraphModule) -> None:
    """Refuse a budget before anything long is done. with_roles: the traced model after AssignRoles; unchanged.

    Does nothing where the pipeline does not plan, search and allocate. Raises InfeasibleBudgetError or OverrideError.
    """
    plan = _first(pipeline, PlanOperands)
    if plan is not None:
        nodes = nodes_with_role(with_roles)
        planned = [replace(annotation_of(node), operands=plan.operands(node)) for node in nodes]
        CheckBudget().among(tuple(pipeline)).check([annotation for annotation in planned if annotation.is_planned])


def _first(passes: Iterable[Pass], kind: type[Kind]) -> Kind | None:
    return next((step for step in passes if isinstance(step, kind)), None)
