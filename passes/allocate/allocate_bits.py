"""AllocateBits: turn the candidates on the graph into a cost table, let an allocator choose, annotate the choice.

The table's cost of an operand at a width is the score ScoreLayers wrote, or without one the predicted loss
SearchScales found; costs add up (`passes.allocate.build_table`). Which allocator, which budget and which layers are
pinned are the pass's options. Not done here: changing any module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import GraphModule

from allocators.allocation import Allocation
from allocators.allocator import Allocator
from allocators.milp import Milp
from allocators.problem.arrays import BoolArray, IntArray
from allocators.problem.brief_table import is_small, to_brief
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from allocators.problem.overrides import Bits
from allocators.problem.uniform_limits import in_numbers
from fxquant import ranks
from fxquant.artefact.cache import Cache, code_signature, signature
from fxquant.checks.arguments import shown, text
from fxquant.checks.hints import check_fields, fitted
from fxquant.errors import BudgetError, OverrideError, SensitivityError
from fxquant.graph.annotation import (
    Annotation,
    Operand,
    Role,
    Source,
    annotate,
    annotation_of,
    planned_nodes,
)
from fxquant.graph.facts import Fact
from fxquant.graph.notes import Note
from passes.allocate.build_table import build_table, latency_ms, refuse_too_wide
from passes.allocate.measure_latency import LATENCY, LATENCY_KNOWN
from passes.pipeline.contract import PassContext
from passes.search.search_scales import SCALES_SEARCHED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED

ALLOCATION = Note("allocation", Allocation, "run AllocateBits first")
"""The allocator's answer."""

COST_TABLE = Note("cost table", CostTable, "run AllocateBits first")
"""The problem that the allocator was given."""

TABLE = "cost_table"
"""The journal's note of that problem in short (`allocators.problem.brief_table`), where it is small enough."""


@dataclass(frozen=True)
class AllocateBits:
    """Choose bits within a budget.

    Args:
        budget: what the bits may use at most; see `Budget`.
        allocator: `Milp()`, `Greedy()`, `Uniform()` or any other `Allocator`.
        overrides: pairs (layer name, role or glob, or one of these with ".left" or ".right" for one input of a product;
            bits or (weight bits, activation bits)), later ones win.
        first_last_bits: pin the patch embedding's weight and the head to this width; None lets the allocator decide, as
            ViT papers do.
        image_bits: width of the patch embedding's input where it is quantized at all; images come in 8 bits, so it is
            not counted in the mean activation bits.
        role_bits: pins whole roles, where the model has them, before overrides.
        narrowest: widths below are used only where the budget cannot be met without them.
        spared: inputs of products by role, "av.left", that may be narrower than that all the same.
    """

    budget: Budget
    allocator: Allocator = Milp()
    overrides: tuple[tuple[str, Bits], ...] = ()
    first_last_bits: int | None = None
    image_bits: int = 8
    role_bits: tuple[tuple[Role, Bits], ...] = ()
    narrowest: int = 2
    spared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Read the budget; raise BudgetError for what cannot be read, for no allocator, and for widths out of range."""
        object.__setattr__(self, "budget", Budget.parse(self.budget))
        check_fields(self, BudgetError, overrides=OverrideError, role_bits=OverrideError)
        for name in ("first_last_bits", "image_bits", "narrowest"):
            width = getattr(self, name)
            if width is not None and width not in range(2, 9):
                raise BudgetError(f"{name} is a width from 2 to 8, not {width!r}")

    @property
    def requires(self) -> frozenset[Fact]:
        """Candidates; and times where the budget limits the latency."""
        timed = frozenset() if self.budget.latency_ms is None else frozenset({LATENCY_KNOWN})
        return timed | {SCALES_SEARCHED}

    @property
    def provides(self) -> frozenset[Fact]:
        """Bits."""
        return frozenset({BITS_ALLOCATED})

    @property
    def breaks(self) -> frozenset[Fact]:
        """Nothing."""
        return frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Annotate bits; returns the number of nodes annotated.

        Raises InfeasibleBudgetError, OverrideError, or SensitivityError for a score that is not a number, and where all
        losses are equal.
        """
        nodes = planned_nodes(graph_module)
        table = self.cost_table(graph_module)
        check_losses(table)
        table, budget = self.without_narrow(table, self.budget), in_numbers(self.budget, table)
        task = context.progress.track("allocating bits", 1)
        allocation = ranks.once("allocating bits", lambda: self._allocation(table, budget, context.cache))
        task.advance()
        task.close()
        widths = table.widths(allocation.assignment(table))
        for layer, node in enumerate(nodes):
            operands = self._allocated(annotation_of(node), widths[:, layer], table.allowed[:, layer].sum(axis=1) <= 1)
            annotate(node, operands=tuple(operands))
        ALLOCATION.write(graph_module, allocation)
        COST_TABLE.write(graph_module, table)
        context.note(
            status=allocation.status,
            solver=allocation.solver,
            predicted_loss=allocation.objective,
            binding=list(allocation.binding),
            usage=allocation.usage,
            **({TABLE: to_brief(table)} if is_small(table) else {}),
            **({"role_bits": {str(role): bits for role, bits in self.role_bits}} if self.role_bits else {}),
        )
        return len(nodes)

    def _allocated(self, annotation: Annotation, widths: IntArray, pinned: BoolArray) -> list[Operand]:
        """A layer's operands at the widths of its two rows in the table; an image's width is no choice."""
        found = list(annotation.operands)
        for row, group in enumerate(annotation.groups):
            for index in group:
                operand = found[index]
                bits = self.image_bits if operand.source is Source.IMAGE else int(widths[row]) or None
                found[index] = replace(operand, bits=bits if operand.families else None, pinned=bool(pinned[row]))
        return found

    def _allocation(self, table: CostTable, budget: Budget, cache: Cache) -> Allocation:
        """The allocator's answer, recalled where it was asked before and is one of ours."""
        if type(self.allocator).__module__.partition(".")[0] != "allocators":
            found = self.allocator.allocate(table, budget)
            if not isinstance(found, Allocation):
                raise BudgetError.for_type(f"{self.allocator!r} returned {shown(found)}, not an Allocation")
            return found
        key = signature(code_signature(), "allocation", repr(self.allocator), table.to_dict(), budget.to_dict())
        return Allocation.from_json(cache.recall(key, lambda: self.allocator.allocate(table, budget).to_json()))

    def without_narrow(self, table: CostTable, budget: Budget | None) -> CostTable:
        """The table without widths below `narrowest`, where the budget can be met without them; None: in any case."""
        wide = table.at_least(self.narrowest, self.spared)
        if budget is None:
            return wide
        budget = in_numbers(budget, table)
        return table if budget.exceeded(wide.minimum_usage(budget)) else wide

    def cost_table(self, graph_module: GraphModule) -> CostTable:
        """The allocation problem of a searched graph, with overrides and policies applied, and times where known."""
        annotations = [annotation_of(node) for node in planned_nodes(graph_module)]
        searched = next(o.candidates for annotation in annotations for o in annotation.operands if o.candidates)
        table = self.table(annotations, tuple(candidate.bits for candidate in searched))
        measured = LATENCY.get(graph_module)
        return table if measured is None else replace(table, latency_ms=latency_ms(table, measured))

    def table(self, annotations: Sequence[Annotation], bits: tuple[int, ...]) -> CostTable:
        """The allocation problem of planned nodes with overrides and policies applied. bits: candidate widths.

        Raises OverrideError for pins above the widths of an operand's families, or of widths that are no candidates.
        """
        table = build_table(annotations, bits, self.image_bits)
        roles = set(table.roles)
        pins: dict[str, Bits] = {str(role): pin for role, pin in self.role_bits}
        if self.first_last_bits is not None:
            pins |= dict.fromkeys((str(Role.PATCH_EMBED), str(Role.HEAD)), self.first_last_bits)
        known = {role: pin for role, pin in pins.items() if role in roles}
        pinned = table.override({**known, **dict(self.overrides)})
        refuse_too_wide(pinned, table)
        return pinned


def check_losses(table: CostTable) -> None:
    """Raise SensitivityError where all losses are equal: no allocation would be better than another."""
    costs = table.cost[table.elements > 0].ravel()
    if len(costs) > 1 and float(costs.min()) == float(costs.max()):
        raise SensitivityError(
            f"all {len(costs)} predicted losses are {float(costs.max()):g}, so no allocation of bits is better than "
            f"another: the output does not react to what any layer computes. Has the last layer been trained (its "
            f"weights may all be 0), and are the calibration images different from one another? A recipe that looks at "
            f"every layer's own error needs no output that reacts: recipe='repq_vit'"
        )


def normalized_overrides(overrides: Mapping[str, Bits] | None) -> tuple[tuple[str, Bits], ...]:
    """Overrides as the hashable pairs the pass keeps; roles may be given as `Role`. Raises OverrideError."""
    if overrides is None:
        return ()
    if not isinstance(overrides, Mapping):
        raise OverrideError.for_type(f"overrides map names, roles or globs to bits, {{'head': 8}}, not {overrides!r}")
    return tuple(
        (
            text("the pattern of an override", pattern, OverrideError),
            fitted(f"override {pattern!r}", bits, Bits, OverrideError),
        )
        for pattern, bits in overrides.items()
    )
