"""MeasureLatency: what every layer would take at every pair of widths on the integer kernels of this machine.

    latency = rest + sum_l (t_l(W_l, A_l) - min t_l)

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
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.fx import GraphModule, Node

from allocators.problem.arrays import FloatArray
from allocators.problem.latency_table import rising
from fxquant.artefact.cache import signature
from fxquant.checks.hints import check_fields
from fxquant.errors import BudgetError
from fxquant.graph.annotation import LATENCY, Fact, annotate, annotation_of, nodes_with_role
from fxquant.graph.nodes import image_of
from fxquant.quantizers.families import widest_bits
from fxquant.quantizers.observers import Edge
from fxquant.runtime.integer.byte_codes import ByteCode, byte_code
from fxquant.runtime.integer.kernel_times import least_ms, linear_ms, machine, matmul_ms, time_key
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedConv2d
from passes.lower.integer_plan import integer_nodes, shape_of
from passes.lower.lower import Lower
from passes.pipeline.contract import PassContext
from passes.search.insert_observers import observers_of
from passes.substitute.substitute_quantizers import SubstituteQuantizers

NOISE = 0.1


@dataclass(frozen=True)
class MeasureLatency:
    """Measure the latencies that a budget in ms is compared with.

    batch_size: images. threads: of torch. Both the budget and the prediction hold for these, on this machine.
    """

    batch_size: int = 1
    threads: int = 1

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.SCALES_SEARCHED, Fact.OBSERVED})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.LATENCY_KNOWN})
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def __post_init__(self) -> None:
        """Raise BudgetError for options that do not fit."""
        check_fields(self, BudgetError)
        if self.batch_size < 1 or self.threads < 1:
            raise BudgetError(f"a latency is of at least one image on at least one thread, found {self}")

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
        found = machine()
        nodes = [node for node in nodes_with_role(graph_module) if observers_of(graph_module, node)]
        widest = _at_the_widest(graph_module, context)
        kernels = {node.name: codes for node, codes in integer_nodes(widest).items()}
        task = context.progress.track("measuring latencies", len(nodes) + 1)
        extra: dict[str, FloatArray] = {}
        for node in nodes:
            if node.name in kernels:
                times = self._times(graph_module, node, widest, context)
                extra[annotation_of(node).layer] = times - times.min()
            task.advance()
        reference = sum(float(times[-1, -1]) for times in extra.values())
        whole = self._whole_ms(widest, context, sorted(map(repr, kernels.values())))
        task.advance()
        task.close()
        rest = max(whole - reference, 0.0)
        graph_module.meta[LATENCY] = {
            "rest_ms": rest,
            "layers": {layer: times.tolist() for layer, times in extra.items()},
        }
        context.note(machine=found, widths=library.speed_of_widths(), rest_ms=rest, widest_ms=whole, timed=len(extra))
        return len(extra)

    def _times(self, graph_module: GraphModule, node: Node, widest: GraphModule, context: PassContext) -> FloatArray:
        """Times in ms at every weight width and input width, float64 (W, A); one row for a product of activations."""
        annotation = annotation_of(node)
        candidates = annotation.activation_candidates
        rows = []
        for column in range(len(candidates[0])):
            codes = [byte_code(group[column].quantizer) for group in candidates]
            known = [code for code in codes if code is not None]
            # A width that the backend does not run is not allowed, so its time does not matter.
            rows.append(self._kernel(graph_module, node, widest, known, context) if len(known) == len(codes) else None)
        slowest = np.max([row for row in rows if row is not None], axis=0)
        times = np.stack([slowest if row is None else row for row in rows], axis=-1)
        is_image = any(o.edge is Edge.IMAGE for _, o in observers_of(graph_module, node))
        return rising(np.broadcast_to(times[:, -1:], times.shape) if is_image else times)

    def _kernel(
        self, graph_module: GraphModule, node: Node, widest: GraphModule, codes: list[ByteCode], context: PassContext
    ) -> FloatArray:
        """Times at every weight width with inputs of these codes, float64 (W,); (1,) without weights."""
        shapes = [_times_batch(shape_of(source), graph_module, self.batch_size) for source in node.all_input_nodes]
        keys = [time_key(code) for code in codes]
        bits = [candidate.bits for candidate in annotation_of(node).weight_candidates]
        key: list[Any] = [keys, self.threads]
        if not bits:
            left, right = shapes
            sizes = (math.prod(left[:-2]), left[-2], left[-1], right[-1])
            name = signature(machine(), "matmul", sizes, *key)
            found = context.cache.recall(name, lambda: matmul_ms(*sizes, codes[0], codes[1], self.threads))
            return np.array([found])
        module: Any = widest.get_submodule(str(node.target))
        out, inner = module.weight_codes.shape[0], module.weight_codes[0].numel()
        if isinstance(module, QuantizedConv2d):
            produced = _times_batch(shape_of(node), graph_module, self.batch_size)
            rows = math.prod(produced) // out
        else:
            rows = math.prod(shapes[0][:-1])
        times = context.cache.recall(
            signature(machine(), "linear", rows, inner, out, bits, *key),
            lambda: [linear_ms(rows, inner, out, width, codes[0], self.threads) for width in bits],
        )
        return np.full(len(times), np.mean(times)) if max(times) <= (1 + NOISE) * min(times) else np.array(times)

    def _whole_ms(self, widest: GraphModule, context: PassContext, codes: list[str]) -> float:
        """The whole model, lowered, on images."""
        images = context.images
        batch = images[torch.arange(self.batch_size) % len(images)]

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
    for node in nodes_with_role(widest):
        annotation = annotation_of(node)
        weight, inputs = annotation.weight_candidates, annotation.activation_candidates
        if weight or inputs:
            limit = min(widest_bits(o.family) for _, o in observers_of(widest, node) if o.family) if inputs else 0
            allowed = [candidate.bits for candidate in inputs[0] if candidate.bits <= limit] if inputs else []
            annotate(
                node,
                weight_bits=weight[-1].bits if weight else None,
                activation_bits=max(allowed) if allowed else inputs[0][0].bits if inputs else None,
            )
    SubstituteQuantizers().apply(widest, context)
    return widest


def _times_batch(shape: tuple[int, ...] | None, graph_module: GraphModule, batch_size: int) -> tuple[int, ...]:
    """A traced shape with `batch_size` images in the place of the traced ones."""
    assert shape is not None  # integer nodes have shapes
    traced = image_of(graph_module).meta["tensor_meta"].shape[0]
    return (shape[0] * batch_size // traced, *shape[1:])
