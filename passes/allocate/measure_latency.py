"""MeasureLatency: what every layer would take at every pair of widths on the integer kernels of this machine.

    latency = rest + sum_l (t_l(b_0l, b_1l) - min t_l)    (of the widths of layer l's two operands)

t_l is the time of layer l's kernel alone, measured once for each distinct shape, weight width and number of digits of
the input's codes (`runtime.byte_codes`: OPT-m and twin scales at 8 bits have two, and take two products). On AVX2,
whose loops depend on how large codes are, also for each of their widths (`kernel_times.time_key`). `rest` is
measured once on the whole lowered model, at the widest widths, less what these add: layer norm, softmax, GELU,
attention's first product, whatever runs simulated. So only differences between widths rest on kernels run alone.

Times of one shape at different weight widths within a tenth (NOISE) are taken for equal; a wider width counts as no
faster than a narrower one (`allocators.problem.latency_table.rising`). They are kept in the context's cache, by machine
and shape.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.fx import GraphModule, Node

from allocators.problem.arrays import FloatArray
from allocators.problem.latency_table import rising
from fxquant import ranks
from fxquant.artefact.cache import signature
from fxquant.checks.hints import check_fields
from fxquant.errors import BudgetError
from fxquant.graph.annotation import Source, annotate_operands, annotation_of, planned_nodes
from fxquant.graph.facts import Fact, missing
from fxquant.graph.nodes import on_cpu
from fxquant.graph.notes import Note
from fxquant.runtime.integer.byte_codes import ByteCode, byte_code
from fxquant.runtime.integer.kernel_times import least_ms, linear_ms, machine, matmul_ms, time_key
from fxquant.runtime.native import library
from passes.lower.exact_codes import integer_nodes
from passes.lower.lower import Lower
from passes.lower.product_sizes import linear_sizes, matmul_sizes
from passes.pipeline.contract import PassContext
from passes.search.search_scales import SCALES_SEARCHED
from passes.substitute.substitute_quantizers import SubstituteQuantizers

NOISE = 0.1

LATENCY: Note[dict[str, Any]] = Note("latency", dict, "run MeasureLatency first")
"""Times in ms, as JSON values. "layers": by layer, what each pair of widths takes beyond the fastest, as a list (W, A).
"rest_ms": everything else in the model."""


def _check_latency(graph_module: GraphModule) -> None:
    """Times of layers have been noted."""
    if not (LATENCY.get(graph_module) or {}).get("layers"):
        raise missing("no times have been measured", "MeasureLatency")


LATENCY_KNOWN = Fact("latency known", _check_latency, rests_on=frozenset({SCALES_SEARCHED}))
"""The graph notes times of every layer at every pair of widths."""


@dataclass(frozen=True)
class MeasureLatency:
    """Measure the latencies that a budget in ms is compared with.

    batch_size: images. threads: of torch. Both the budget and the prediction hold for these, on this machine.
    """

    batch_size: int = 1
    threads: int = 1

    requires: ClassVar[frozenset[Fact]] = frozenset({SCALES_SEARCHED})
    provides: ClassVar[frozenset[Fact]] = frozenset({LATENCY_KNOWN})
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def __post_init__(self) -> None:
        """Raise BudgetError for options that do not fit."""
        check_fields(self, BudgetError)
        if self.batch_size < 1 or self.threads < 1:
            raise BudgetError(
                f"a latency is measured with a batch_size of at least 1 and at least 1 thread; found {self}"
            )

    @property
    def described(self) -> str:
        """For the protocol card: what a latency holds for. Raises BackendError without kernels."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"batch of {self.batch_size}, {threads}, {machine()['processor']}, {machine()['instruction_set']}"

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Write the times into the graph's meta; returns how many layers have times of their own.

        Notes the machine, what widths do to speed there, `rest_ms` and the latency at the widest widths. Raises
        BackendError without kernels.
        """
        host = machine()
        nodes = planned_nodes(graph_module)
        widest = _at_the_widest(graph_module, context)
        kernels = {node.name: codes for node, codes in integer_nodes(widest).items()}

        def measured() -> tuple[dict[str, FloatArray], float]:
            task = context.progress.track("measuring latencies", len(nodes) + 1)
            found: dict[str, FloatArray] = {}
            for node in nodes:
                if node.name in kernels:
                    found[annotation_of(node).layer] = self._times(graph_module, node, widest, context)
                task.advance()
            whole = self._whole_ms(widest, context, sorted(map(repr, kernels.values())))
            task.advance()
            task.close()
            return found, whole

        # By one rank alone: ranks on one machine would slow each other down, and each would find other times.
        times, whole = ranks.once("measuring latencies", measured)
        extra = {layer: of_layer - of_layer.min() for layer, of_layer in times.items()}
        reference = sum(float(of_layer[-1, -1]) for of_layer in extra.values())
        rest = max(whole - reference, 0.0)
        layers = {layer: times.tolist() for layer, times in extra.items()}
        LATENCY.write(graph_module, {"rest_ms": rest, "layers": layers})
        context.note(machine=host, widths=library.speed_of_widths(), rest_ms=rest, widest_ms=whole, timed=len(extra))
        return len(extra)

    def _times(self, graph_module: GraphModule, node: Node, widest: GraphModule, context: PassContext) -> FloatArray:
        """Times in ms at every pair of widths of a layer's two rows in the table, float64 (1 or C, C)."""
        annotation = annotation_of(node)
        codes = [[byte_code(candidate.quantizer) for candidate in operand.candidates] for operand in annotation.inputs]
        if annotation.weight is not None or annotation.inputs[0].tied:
            columns = [tuple(pair) for pair in zip(*codes, strict=True)]  # inputs of one width
            times = self._known(graph_module, node, widest, columns, context)
        else:
            left, right = codes
            times = np.concatenate(
                [
                    self._known(graph_module, node, widest, [(first, second) for second in right], context)
                    for first in left
                ]
            )
        is_image = any(operand.source is Source.IMAGE for operand in annotation.inputs)
        return rising(np.broadcast_to(times[:, -1:], times.shape) if is_image else times)

    def _known(
        self,
        graph_module: GraphModule,
        node: Node,
        widest: GraphModule,
        columns: Sequence[tuple[ByteCode | None, ...]],
        context: PassContext,
    ) -> FloatArray:
        """Times at every weight width, one row without weights, and at every column of the inputs' codes."""
        found = [
            None if None in codes else self._kernel(graph_module, node, widest, [c for c in codes if c], context)
            for codes in columns
        ]
        # A width that the backend does not run is not allowed, so its time does not matter.
        slowest = np.max([row for row in found if row is not None], axis=0)
        return np.stack([slowest if row is None else row for row in found], axis=-1)

    def _kernel(
        self, graph_module: GraphModule, node: Node, widest: GraphModule, codes: list[ByteCode], context: PassContext
    ) -> FloatArray:
        """Times at every weight width with inputs of these codes, float64 (W,); (1,) without weights."""
        weight = annotation_of(node).weight
        bits = [] if weight is None else [candidate.quantizer.widest_bits for candidate in weight.candidates]
        key: list[Any] = [[time_key(code) for code in codes], self.threads]
        if not bits:
            sizes = matmul_sizes(graph_module, node, self.batch_size)
            name = signature(machine(), "matmul", sizes, *key)
            found = context.cache.recall(name, lambda: matmul_ms(*sizes, codes[0], codes[1], self.threads))
            return np.array([found])
        layer = linear_sizes(graph_module, node, widest.get_submodule(str(node.target)), self.batch_size)
        times = context.cache.recall(
            signature(machine(), "linear", *layer, bits, *key),
            lambda: [linear_ms(*layer, width, codes[0], self.threads) for width in bits],
        )
        return np.full(len(times), np.mean(times)) if max(times) <= (1 + NOISE) * min(times) else np.array(times)

    def _whole_ms(self, widest: GraphModule, context: PassContext, codes: list[str]) -> float:
        """The whole model, lowered, on images."""
        images = context.images
        batch = images[torch.arange(self.batch_size) % len(images)].cpu()

        def measured() -> float:
            lowered = copy.deepcopy(widest)
            Lower("cpu-native").apply(lowered, PassContext())
            with torch.inference_mode():
                return least_ms(lambda: lowered(batch), self.threads, seconds=0.5)

        key = signature(machine(), widest.code, list(batch.shape), self.threads, codes)
        found: float = context.cache.recall(key, measured)
        return found


def _at_the_widest(graph_module: GraphModule, context: PassContext) -> GraphModule:
    """A copy of a searched graph, quantized at the widest widths that its families have."""
    widest = copy.deepcopy(graph_module)
    for node in planned_nodes(widest):
        annotation = annotation_of(node)
        bits: list[int | None] = [None] * len(annotation.operands)
        for group in annotation.groups:
            found = [annotation.operands[index] for index in group]
            limit = min((operand.widest_bits for operand in found if operand.candidates), default=0)
            for index, operand in zip(group, found, strict=True):
                allowed = [candidate.bits for candidate in operand.candidates if candidate.bits <= limit]
                bits[index] = max(allowed, default=operand.candidates[0].bits if operand.candidates else None)
        annotate_operands(node, bits=bits)
    SubstituteQuantizers().apply(widest, context)
    return on_cpu(widest)
