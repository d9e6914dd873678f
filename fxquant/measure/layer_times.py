"""How long the kernel of every layer takes on this machine, each alone, beside the whole lowered model.

A layer's time depends on its shape, on the width of its weight and on the codes of its inputs; equal ones are measured
once. Kernels run without what a lowered model fuses to them (norms, softmax, epilogues), so the shares of all layers do
not add up to the whole. Deliberately not done: other batches than of one image, other threads than one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.graph.annotation import annotation_of
from fxquant.graph.nodes import image_of, on_cpu
from fxquant.report.progress import shown
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.kernel_times import least_ms, linear_ms, machine, matmul_ms, time_key
from passes.lower.exact_codes import integer_nodes
from passes.lower.lower import Lower
from passes.lower.product_sizes import linear_sizes, matmul_sizes
from passes.pipeline.contract import PassContext
from passes.pipeline.progress import ProgressReporter

_SECONDS = 0.3


def layer_times(graph_module: GraphModule, progress: ProgressReporter | bool | None = None) -> dict[str, Any]:
    """JSON values of a simulated graph: `layers`, ms by layer; `whole_ms`; `of_what`, in words.

    progress: where it reports how far it is, as in `fxquant.compile`. Layers that kernels do not run exactly are left
    out. Raises BackendError where there are no kernels.
    """
    found, graph_module = machine(), on_cpu(graph_module)
    known: dict[tuple[Any, ...], float] = {}
    layers: dict[str, float] = {}
    nodes = integer_nodes(graph_module)
    with shown(progress) as reporter:
        task = reporter.track("timing kernels", len(nodes))
        for node, codes in nodes.items():
            layers[annotation_of(node).layer] = _time(graph_module, node, codes, known)
            task.advance()
        task.close()
    lowered = copy.deepcopy(graph_module)
    Lower("cpu-native").apply(lowered, PassContext())
    image = torch.zeros(1, *image_of(graph_module).meta["tensor_meta"].shape[1:])
    with torch.inference_mode():
        whole_ms = least_ms(lambda: lowered(image), threads=1, seconds=_SECONDS)
    where = f"{found['processor']}, {found['instruction_set']}"
    of_what = f"one image, one thread, {where}; the whole model takes {whole_ms:.2f} ms"
    return {"layers": layers, "whole_ms": whole_ms, "of_what": of_what}


def _time(
    graph_module: GraphModule, node: Node, codes: tuple[ByteCode, ...], known: dict[tuple[Any, ...], float]
) -> float:
    """ms of one layer; what was measured for a layer alike is taken from `known`, and added to it."""
    keys = [time_key(code) for code in codes]
    if len(codes) == 2:
        sizes = matmul_sizes(graph_module, node, batch_size=1)
        key: tuple[Any, ...] = (*sizes, *keys)
        if key not in known:
            known[key] = matmul_ms(*sizes, codes[0], codes[1], threads=1)
        return known[key]
    module: Any = graph_module.get_submodule(str(node.target))
    layer = linear_sizes(graph_module, node, module, batch_size=1)
    bits = module.weight_quantizer.widest_bits  # at which its kernel runs
    key = (*layer, bits, *keys)
    if key not in known:
        known[key] = linear_ms(*layer, bits, codes[0], threads=1)
    return known[key]
