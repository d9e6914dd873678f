"""UpdateBits: LampQ's iterative update of an allocation, by measured reconstruction errors and a score on the images.

    gain(+1) = E(b) - E(b + 1),    loss(-1) = E(b - 1) - E(b)    (LampQ prints the two the wrong way round)

Each round takes the exchange of bits (`allocators.exchanges`) that lowers the summed error most within the budget, and
keeps it if the model's output comes closer to the float model's or, with labels, if fewer classes are wrong. It ends
when no exchange promises anything, or when `patience` exchanges in a row have not kept their promise.
`PAPERS_UPDATE` is Algorithm 1, lines 13 to 26.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.fx import GraphModule, Node

from allocators.allocation import Allocation
from allocators.exchanges import Step, exchanges, steps
from allocators.problem.arrays import IntArray
from allocators.problem.cost_table import Assignment, CostTable
from fxquant.artefact.cache import signature
from fxquant.checks.hints import check_fields
from fxquant.errors import PipelineError
from fxquant.graph.annotation import Annotation, Role, annotate_operands, annotation_of, planned_nodes
from fxquant.graph.facts import Fact
from fxquant.sensitivity.measured import Bits, Divergence
from fxquant.sensitivity.objective import CLASSES
from fxquant.sensitivity.reconstruction import expected_ratio, reconstruction_errors
from passes.allocate.allocate_bits import ALLOCATION, COST_TABLE
from passes.allocate.score_layers import LAMPQ_ROLES, described_candidates
from passes.pipeline.contract import PassContext
from passes.search.search_scales import SCALES_SEARCHED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED


@dataclass(frozen=True)
class UpdateBits:
    """Exchange bits between layers while that helps. Deterministic; not idempotent, since it goes on where it stopped.

    Args:
        estimate: where errors at neighbouring widths come from: "measured"; or "expected" from the error at the current
            width by Lemma 3's ratios for normal data, as the paper does it, which needs tied widths.
        held_out: share of the calibration images that only the score sees; the errors are measured on the others. At 0
            both see all of them.
        patience: how many exchanges in a row may fail to lower the score; the paper takes 1. None takes every exchange
            that promises something, and only records the score.
        labels: the class of every calibration image. With them the score is the share of images classified wrongly, as
            in the paper; without, the divergence from the float model.
        ties: whether an exchange that leaves the score as it was is kept, as in the paper (line 22 stops at "less
            accurate"); among few images accuracies are often equal.
        size: how many layers take part in an exchange, 1 to 3.
        weighted: whether an error counts so much that it is the layer's cost in the table at the start, which keeps the
            metric's view of the layers. The paper counts all errors alike.
        rounds: how many exchanges are tried at most.
        tied: whether a layer's weights and inputs step together.
        roles: which layers exchange bits.
    """

    estimate: Literal["measured", "expected"] = "measured"
    held_out: float = 0.0
    patience: int | None = 3
    labels: tuple[int, ...] = ()
    ties: bool = False
    size: int = 3
    weighted: bool = False
    rounds: int = 30
    tied: bool = True
    roles: tuple[Role, ...] = LAMPQ_ROLES

    requires: ClassVar[frozenset[Fact]] = frozenset({SCALES_SEARCHED, BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def __post_init__(self) -> None:
        """Raise PipelineError for options out of range."""
        check_fields(self, PipelineError)
        in_range = 0 <= self.held_out < 1 and 1 <= self.size <= 3 and self.rounds >= 0
        if not in_range or (self.patience is not None and self.patience < 1):
            raise PipelineError(
                f"held_out must be at least 0 and below 1, size 1 to 3, rounds at least 0 and patience at least 1; "
                f"found {self}"
            )
        if self.estimate == "expected" and not self.tied:
            raise PipelineError('estimate="expected" is derived for equal widths of weights and inputs: use tied=True')

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Annotate the new bits; returns the number of nodes changed.

        Notes `trajectory`: [{"raised": {layer: [W, A] afterwards}, "lowered", "predicted": summed change of the errors,
        "realised": change of the score, "kept"}], `score_before` and `score_after` in the unit of the objective, with
        labels shares of images, `stopped`, and the new `usage` and `predicted_loss`.

        Raises PipelineError without the cost table of AllocateBits, and for other than one label for each image.
        """
        started_s = time.perf_counter()
        allocation, table = ALLOCATION.get(graph_module), COST_TABLE.get(graph_module)
        if allocation is None or table is None:
            raise PipelineError("UpdateBits needs the allocation and the cost table that AllocateBits leaves")
        if self.labels and len(self.labels) != len(context.images):
            raise PipelineError(
                f"UpdateBits has {len(self.labels)} labels for {len(context.images)} images: give one for each image"
            )
        nodes = planned_nodes(graph_module)
        start = [allocation.weight_bits, allocation.activation_bits, allocation.budget.to_dict(), table.to_dict()]
        described = [described_candidates(annotation_of(node)) for node in nodes]
        key = context.signature(graph_module, "update", repr(self), described, start)
        found = context.cache.recall(
            key, lambda: _Search(self, graph_module, nodes, table, allocation, context, key).run()
        )
        columns = np.array(found["columns"])
        changed = 0
        widths = table.widths(columns)
        for layer, node in enumerate(nodes):
            bits = _operand_bits(annotation_of(node), widths[:, layer])
            if bits != annotation_of(node).bits:
                annotate_operands(node, bits=bits)
                changed += 1
        updated = (
            allocation
            if not changed
            else Allocation.of(
                table,
                columns,
                allocation.budget,
                status="heuristic",
                gap=None,
                solver=f"{allocation.solver}, updated",
                seconds=allocation.seconds + time.perf_counter() - started_s,
            )
        )
        ALLOCATION.write(graph_module, updated)
        context.note(**found["notes"], usage=updated.usage, predicted_loss=updated.objective)
        return changed


PAPERS_UPDATE = UpdateBits(estimate="expected", patience=1, size=2, ties=True)
"""LampQ's own update; with `labels` its stop too, "until the model accuracy on the sample dataset stops improving"."""

Taken = frozenset[tuple[int, tuple[int, int]]]
"""An exchange: (row, columns afterwards) of each layer that takes part."""


class _Search:
    """One run: the assignment so far, the errors measured so far, and the score.

    key: signature of all that the run depends on. Errors and scores are kept under it one by one, so that a process
    that takes the place of a killed one has them all at once.
    """

    def __init__(
        self,
        options: UpdateBits,
        graph_module: GraphModule,
        nodes: list[Node],
        table: CostTable,
        allocation: Allocation,
        context: PassContext,
        key: str,
    ) -> None:
        self.key = key
        self.options, self.graph_module, self.nodes, self.table = options, graph_module, nodes, table
        self.budget, self.context = allocation.budget, context
        self.assignment = allocation.assignment(table)
        self.movable = [row for row, node in enumerate(nodes) if annotation_of(node).role in options.roles]
        count = len(context.images)
        kept = min(round(options.held_out * count), count - 1)
        self.error_images = context.images[: count - kept]
        scored = context.images[-kept:] if kept else context.images
        self.labels = torch.tensor(options.labels)[-len(scored) :] if options.labels else None
        objective = context.objective if self.labels is None else CLASSES
        self.divergence = Divergence(graph_module, scored, context.batch_size, objective=objective)
        self.errors: dict[tuple[int, int, int], float] = {}
        self.weights: dict[int, float] = {}

    def run(self) -> dict[str, Any]:
        """The columns found, [2, L], and the notes."""
        options, patience = self.options, self.options.patience
        before = score = self._score(self.assignment)
        trajectory: list[dict[str, Any]] = []
        refused: set[Taken] = set()
        failures, stopped = 0, "rounds are used up"
        task = self.context.progress.track("updating bits", options.rounds)
        for _ in range(options.rounds):
            found = self._best(refused)
            if found is None:
                stopped = "no exchange promises anything"
                break
            predicted, taken = found
            changed = _after(self.assignment, taken)
            realised = self._score(changed) - score
            kept = patience is None or realised < 0 or (options.ties and realised == 0)
            trajectory.append(self._told(taken, predicted, realised, kept))
            if kept:
                # A refusal holds only where it was tried.
                self.assignment, score, failures, refused = changed, score + realised, 0, set()
            else:
                refused.add(_identity(taken))
                failures += 1
            task.advance()
            if patience is not None and failures >= patience:
                stopped = f"{failures} exchanges in a row {'raised' if options.ties else 'did not lower'} the score"
                break
        task.close()
        notes = {"trajectory": trajectory, "score_before": before, "score_after": score, "stopped": stopped}
        return {"columns": self.assignment.tolist(), "notes": notes}

    def _best(self, refused: set[Taken]) -> tuple[float, list[Step]] | None:
        """The most promising exchange that has not been refused."""
        options = self.options
        offered = steps(self.table, self.assignment, self.movable, self.budget, tied=options.tied)
        self._measure(offered)
        if not self.weights:
            self.weights = {row: self._weight(row) for row in self.movable}
        change = np.array(
            [
                self.weights[step.layer] * (self._error(step.layer, step.columns) - self._error(step.layer))
                for step in offered
            ]
        )
        ranked: Iterable[tuple[float, list[Step]]] = exchanges(
            self.table, self.assignment, self.budget, offered, change, options.size
        )
        return next(((net, taken) for net, taken in ranked if _identity(taken) not in refused), None)

    def _measure(self, offered: list[Step]) -> None:
        """Measure what is missing of the errors at current and, unless they are only expected, offered widths."""
        wanted = {(row, *self._columns_of(row)) for row in self.movable}
        if self.options.estimate == "measured":
            wanted |= {(step.layer, *step.columns) for step in offered}
        missing = sorted(wanted - self.errors.keys())
        pairs: dict[Node, list[tuple[int, int]]] = {}
        for row, *columns in missing:
            pairs.setdefault(self.nodes[row], []).append(self._bits(columns[0], columns[1]))
        if not pairs:
            return

        def measured() -> list[float]:
            batches = torch.split(self.error_images, self.context.batch_size)
            found = reconstruction_errors(self.graph_module, pairs, batches)
            return [found[self.nodes[row]][self._bits(columns[0], columns[1])] for row, *columns in missing]

        errors = self.context.cache.recall(signature(self.key, "errors", missing), measured)
        self.errors |= {(row, first, second): e for (row, first, second), e in zip(missing, errors, strict=True)}

    def _weight(self, row: int) -> float:
        """What one unit of a layer's relative error counts."""
        if not self.options.weighted:
            return 1.0
        pairs = zip(self.table.sides, self._columns_of(row), strict=True)
        cost = sum(float(side.cost[row, column]) for side, column in pairs if column >= 0)
        return cost / max(self._error(row), 1e-30)

    def _error(self, row: int, columns: tuple[int, int] | None = None) -> float:
        """E of a layer at its current or other columns."""
        current = self._columns_of(row)
        columns = columns or current
        if columns == current or self.options.estimate == "measured":
            return self.errors[(row, *columns)]
        now, then = (max(self._bits(*pair)) for pair in (current, columns))
        ratio = np.prod([expected_ratio(bits) for bits in range(min(now, then) + 1, max(now, then) + 1)])
        here = self.errors[row, current[0], current[1]]
        return float(here * ratio if then < now else here / ratio)

    def _columns_of(self, row: int) -> tuple[int, int]:
        return int(self.assignment[0, row]), int(self.assignment[1, row])

    def _bits(self, *columns: int) -> tuple[int, int]:
        first, second = (int(self.table.bits[column]) if column >= 0 else 0 for column in columns)
        return first, second

    def _score(self, assignment: Assignment) -> float:
        """What the whole assignment costs: its divergence from the float model, or the share of wrong classes."""
        widths = self.table.widths(assignment)
        bits = {n: _operand_bits(annotation_of(n), widths[:, layer]) for layer, n in enumerate(self.nodes)}
        key = signature(self.key, "score", assignment.tolist())
        found: float = self.context.cache.recall(key, lambda: self._measured(bits))
        return found

    def _measured(self, bits: Mapping[Node, Bits]) -> float:
        if self.labels is None:
            return self.divergence.of(bits)
        log_probabilities, *_ = self.divergence.outputs(bits)
        return float((log_probabilities.argmax(1) != self.labels).double().mean())

    def _told(self, taken: list[Step], predicted: float, realised: float, kept: bool) -> dict[str, Any]:
        sides = {
            name: {self.table.layers[s.layer]: list(self._bits(*s.columns)) for s in taken if s.direction == direction}
            for name, direction in (("raised", 1), ("lowered", -1))
        }
        return {**sides, "predicted": predicted, "realised": realised, "kept": kept}


def _operand_bits(annotation: Annotation, widths: IntArray) -> tuple[int | None, ...]:
    """The bits of a node's operands at the widths of its two rows in the table.

    What is not in the table (0), as an image, stays as it is.
    """
    bits = list(annotation.bits)
    for group, width in zip(annotation.groups, widths.tolist(), strict=True):
        for index in group:
            bits[index] = width or bits[index]
    return tuple(bits)


def _after(assignment: Assignment, taken: list[Step]) -> Assignment:
    changed = assignment.copy()
    for step in taken:
        changed[:, step.layer] = step.columns
    return changed


def _identity(taken: list[Step]) -> Taken:
    return frozenset((step.layer, step.columns) for step in taken)
