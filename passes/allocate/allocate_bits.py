"""AllocateBits: turn the candidates on the graph into a cost table, let an allocator choose, annotate the choice.

The table's cost of a tensor at a width is the sensitivity ScoreLayers wrote, or without one the predicted loss
SearchScales found; costs of tensors add up. Which allocator, which budget and which layers are pinned are the pass's
options. Not done here: changing any module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch.fx import GraphModule, Node

from allocators.allocation import Allocation
from allocators.allocator import Allocator
from allocators.milp import Milp
from allocators.problem.arrays import FloatArray
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from allocators.problem.overrides import Bits
from allocators.problem.uniform_limits import in_numbers
from allocators.problem.usage import FLOAT_BITS
from fxquant.artefact.cache import Cache, code_signature, signature
from fxquant.checks.arguments import shown, text
from fxquant.checks.hints import check_fields, fitted
from fxquant.errors import BudgetError, OverrideError, SensitivityError
from fxquant.graph.annotation import (
    SOFTMAX,
    Annotation,
    Candidate,
    Role,
    annotate,
    annotation_of,
    nodes_with_role,
)
from fxquant.graph.facts import Fact
from fxquant.graph.notes import Note
from fxquant.quantizers.families import widest_bits
from fxquant.quantizers.observers import Edge
from passes.allocate.measure_latency import LATENCY, LATENCY_KNOWN
from passes.pipeline.contract import PassContext
from passes.search.insert_observers import observers_of
from passes.search.search_scales import SCALES_SEARCHED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED

ALLOCATION = Note("allocation", Allocation, "run AllocateBits first")
"""The allocator's answer."""

COST_TABLE = Note("cost table", CostTable, "run AllocateBits first")
"""The problem that the allocator was given."""


@dataclass(frozen=True)
class AllocateBits:
    """Choose bits within a budget.

    budget: see `Budget`. allocator: `Milp()`, `Greedy()`, `Uniform()` or any other `Allocator`. overrides: pairs
    (layer name, role or glob; bits or (weight bits, activation bits)), later ones win. role_bits: the same for whole
    roles, where the model has them, before overrides. first_last_bits: pin the patch embedding's weight and the head
    to this width; None lets the allocator decide, as ViT papers do. image_bits: width of the patch embedding's input
    where it is quantized at all; images come in 8 bits, so it is not counted in the mean activation bits. narrowest:
    widths below are used only where the budget cannot be met without them. softmax_bits: width of attention
    probabilities, which then have a line of their own in the table and in overrides, "<layer>.softmax"; None: they
    share the bits of the values that they are multiplied with.
    """

    budget: Budget
    allocator: Allocator = Milp()
    overrides: tuple[tuple[str, Bits], ...] = ()
    first_last_bits: int | None = None
    image_bits: int = 8
    role_bits: tuple[tuple[Role, Bits], ...] = ()
    narrowest: int = 2
    softmax_bits: int | None = None

    provides: ClassVar[frozenset[Fact]] = frozenset({BITS_ALLOCATED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def __post_init__(self) -> None:
        """Read the budget; raise BudgetError for what cannot be read, for no allocator, and for widths out of range."""
        object.__setattr__(self, "budget", Budget.parse(self.budget))
        check_fields(self, BudgetError, overrides=OverrideError, role_bits=OverrideError)
        for name in ("first_last_bits", "image_bits", "narrowest", "softmax_bits"):
            width = getattr(self, name)
            if width is not None and width not in range(2, 9):
                raise BudgetError(f"{name} is a width from 2 to 8, not {width!r}")

    @property
    def requires(self) -> frozenset[Fact]:
        """Candidates; and times where the budget limits the latency."""
        timed = frozenset() if self.budget.latency_ms is None else frozenset({LATENCY_KNOWN})
        return timed | {SCALES_SEARCHED}

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Annotate bits; returns the number of nodes annotated.

        Raises InfeasibleBudgetError, OverrideError, or SensitivityError for a score that is not a number, and where all
        losses are equal.
        """
        nodes = [node for node in nodes_with_role(graph_module) if observers_of(graph_module, node)]
        table = self.cost_table(graph_module, nodes)
        check_losses(table)
        table, budget = self.without_narrow(table, self.budget), in_numbers(self.budget, table)
        task = context.progress.track("allocating bits", 1)
        allocation = self._allocation(table, budget, context.cache)
        task.advance()
        task.close()
        images = image_readers(graph_module, nodes)
        for row, node in enumerate(nodes):
            annotation = annotation_of(node)
            image = annotation.activation_candidates and node in images
            activation_bits = self.image_bits if image else allocation.activation_bits.get(annotation.layer)
            pinned = int(table.allowed_weight[row].sum()) <= 1 or int(table.allowed_activation[row].sum()) <= 1
            annotate(
                node,
                weight_bits=allocation.weight_bits.get(annotation.layer),
                activation_bits=activation_bits,
                left_bits=allocation.activation_bits.get(annotation.layer + SOFTMAX),
                pinned=pinned,
            )
        ALLOCATION.write(graph_module, allocation)
        COST_TABLE.write(graph_module, table)
        context.note(
            status=allocation.status,
            solver=allocation.solver,
            predicted_loss=allocation.objective,
            binding=list(allocation.binding),
            usage=allocation.usage,
            **({"role_bits": {str(role): bits for role, bits in self.role_bits}} if self.role_bits else {}),
        )
        return len(nodes)

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
        wide = table.at_least(self.narrowest)
        if budget is None:
            return wide
        budget = in_numbers(budget, table)
        return table if budget.exceeded(wide.minimum_usage(budget)) else wide

    def cost_table(self, graph_module: GraphModule, nodes: Sequence[Node]) -> CostTable:
        """The allocation problem of these nodes, with overrides and policies applied."""
        annotations = [annotation_of(node) for node in nodes]
        images = image_readers(graph_module, nodes)
        counted = [
            0 if node in images or not annotation.activation_candidates else annotation.activation_elements
            for node, annotation in zip(nodes, annotations, strict=True)
        ]
        fixed = [
            self.image_bits if node in images and annotation.activation_candidates else FLOAT_BITS
            for node, annotation in zip(nodes, annotations, strict=True)
        ]
        quantized = [[o for _, o in observers_of(graph_module, node) if o.family is not None] for node in nodes]
        families = [[str(observer.family) for observer in found] for found in quantized]
        weights = [annotation.weight_candidates for annotation in annotations]
        bits = tuple(candidate.bits for candidate in next(found for found in weights if found))
        own = {row for row, found in enumerate(quantized) if self.has_own_softmax([o.edge for o in found])}
        activation = [
            _scores(a.activation_candidates[row in own :], bits, a.activation_sensitivity)
            for row, a in enumerate(annotations)
        ]
        table = self.table(
            annotations,
            counted,
            fixed,
            [min(map(widest_bits, named), default=bits[-1]) for named in families],
            bits,
            weight=[_scores((a.weight_candidates,), bits, a.weight_sensitivity) for a in annotations],
            activation=activation,
            softmax={row: _scores(annotations[row].activation_candidates[:1], bits, ()) for row in sorted(own)},
        )
        measured = LATENCY.get(graph_module)
        return table if measured is None else replace(table, latency_ms=_latency_ms(measured, table))

    def table(
        self,
        annotations: Sequence[Annotation],
        activation_elements: Sequence[int],
        fixed_activation_bits: Sequence[int],
        widest: Sequence[int],
        bits: tuple[int, ...],
        weight: Sequence[Scores],
        activation: Sequence[Scores],
        softmax: Mapping[int, Scores],
    ) -> CostTable:
        """A cost table from scores per layer: (losses, SQNR in dB), one number per width.

        fixed_activation_bits: bits of inputs outside the allocation, 32 where they stay float. widest: width in bits
        up to which a layer's inputs have families. softmax: by row, the scores of attention probabilities that have
        bits of their own. Raises OverrideError for pins above a width, or of widths that are no candidates.
        """
        rows, own = [*annotations, *(annotations[row] for row in softmax)], list(softmax)
        count, nothing = len(annotations), [([0.0] * len(bits), [0.0] * len(bits))] * len(own)
        left = np.array([annotation.left_elements for annotation in annotations])
        elements, widest = np.append(activation_elements, left[own]), [*widest, *(widest[row] for row in own)]
        elements[own] -= left[own]
        weight, activation = [*weight, *nothing], [*activation, *softmax.values()]
        within = np.array(bits) <= np.array(widest)[:, None]
        no_weights = np.zeros(len(own), dtype=np.int64)
        table = CostTable(
            layers=tuple(a.layer + SOFTMAX * (row >= count) for row, a in enumerate(rows)),
            roles=tuple(str(annotation.role) for annotation in rows),
            weight_elements=np.append([annotation.parameters for annotation in annotations], no_weights),
            activation_elements=elements,
            macs=np.append([annotation.macs for annotation in annotations], no_weights),
            weight_bits=bits,
            activation_bits=bits,
            weight_cost=np.array([losses for losses, _ in weight]),
            activation_cost=np.array([losses for losses, _ in activation]),
            weight_sqnr_db=np.array([sqnr for _, sqnr in weight]),
            activation_sqnr_db=np.array([sqnr for _, sqnr in activation]),
            allowed_weight=np.ones((len(rows), len(bits)), dtype=bool),
            allowed_activation=within,
            fixed_activation_bits=np.append(fixed_activation_bits, no_weights + FLOAT_BITS),
        )
        roles = {str(annotation.role) for annotation in annotations}
        pins: dict[str, Bits] = {str(role): bits for role, bits in self.role_bits if str(role) in roles}
        if self.first_last_bits is not None:
            ends = (Role.PATCH_EMBED, Role.HEAD)
            pins |= {str(role): self.first_last_bits for role in ends if str(role) in roles}
        pins = dict.fromkeys(table.layers[count:], (None, self.softmax_bits)) | pins
        pinned = table.override({**pins, **dict(self.overrides)})
        for layer, column in np.argwhere(pinned.allowed_activation & ~within)[:1]:
            raise OverrideError(
                f"the inputs of layer {table.layers[layer]!r} are pinned at {bits[column]} bits, and their quantizers "
                f"end at {widest[layer]}: pin them lower, or allow other families or another backend"
            )
        left_bits = np.zeros(len(rows), dtype=np.int64)
        left_bits[own] = [bits[column] for column in pinned.allowed_activation[count:].argmax(axis=1)]
        return replace(pinned, left_bits=left_bits)

    def has_own_softmax(self, edges: Sequence[Edge]) -> bool:
        """Whether attention probabilities among a node's quantized inputs get bits of their own."""
        return self.softmax_bits is not None and len(edges) > 1 and edges[0] is Edge.POST_SOFTMAX


def check_losses(table: CostTable) -> None:
    """Raise SensitivityError where all losses are equal: no allocation would be better than another."""
    weight = table.weight_cost[table.weight_elements > 0]
    costs = np.concatenate([weight.ravel(), table.activation_cost[table.activation_elements > 0].ravel()])
    if len(costs) > 1 and float(costs.min()) == float(costs.max()):
        raise SensitivityError(
            f"all {len(costs)} predicted losses are {float(costs.max()):g}, so no allocation of bits is better than "
            f"another: the output does not react to what any layer computes. Has the last layer been trained (its "
            f"weights may all be 0), and are the calibration images different from one another? A recipe that looks at "
            f"every layer's own error needs no output that reacts: recipe='repq_vit'"
        )


Scores = tuple[list[float], list[float]]


def _scores(operands: Sequence[tuple[Candidate, ...]], bits: tuple[int, ...], sensitivity: tuple[float, ...]) -> Scores:
    """Cost and joint SQNR in dB of operands that share one width, for each width.

    The cost is the sensitivity where a pass has measured one, else the summed loss of the candidates.
    """
    if not any(operands):
        return [0.0] * len(bits), [0.0] * len(bits)
    losses, sqnr = [], []
    for column in range(len(bits)):
        chosen = [candidates[column] for candidates in operands]
        losses.append(sum(candidate.loss for candidate in chosen))
        # Operands differ in scale, so each counts by its own ratio; their mean noise-to-signal ratio is the layer's.
        ratio = float(np.mean([candidate.noise / max(candidate.signal, 1e-30) for candidate in chosen]))
        sqnr.append(-10 * math.log10(max(ratio, 1e-30)))
    return list(sensitivity or losses), sqnr


def _latency_ms(measured: Mapping[str, Any], table: CostTable) -> FloatArray:
    """MeasureLatency's times as (L, W, A); what no width changes counts with the first layer."""
    found = np.zeros((len(table.layers), len(table.weight_bits), len(table.activation_bits)))
    for layer, times in measured["layers"].items():
        found[table.layers.index(layer)] = times
    found[0] += measured["rest_ms"]
    return found


def image_readers(graph_module: GraphModule, nodes: Sequence[Node]) -> set[Node]:
    """Nodes whose input is the image itself."""
    return {node for node in nodes if any(o.edge is Edge.IMAGE for _, o in observers_of(graph_module, node))}


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
