"""Quantized graphs and their lowering, for every test of integer execution."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from allocators.uniform import Uniform
from fxquant.graph.annotation import annotate, nodes_with_role
from fxquant.graph.facts import QUANTIZED
from fxquant.runtime import simulated
from fxquant.runtime.native import library
from passes.lower.lower import Lower
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import RECIPES
from passes.search.plan_operands import PlanOperands
from tests.models import built, images, traced
from tests.operands import operands

needs_kernels = pytest.mark.skipif(library.why_absent() is not None, reason=str(library.why_absent()))
needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="oneDNN needs AVX512-VNNI to be exact")


def quantized(
    architecture: str,
    recipe: str = "mptq_vit",
    budget: str = "W4A6",
    *,
    bits: tuple[int, ...] = (4, 6),
    fully: bool = False,
    **families: str,
) -> GraphModule:
    """A copy of its own of the architecture, quantized; computed once a process.

    Args:
        architecture: one of `tests.models.ARCHITECTURES`, or `ONE_BLOCK`.
        recipe: one of `RECIPES`.
        budget: mean bits, as `Budget.parse` reads them; every layer gets the same.
        bits: widths that are searched.
        fully: softmax and LayerNorm inputs are quantized too.
        families: options of `PlanOperands` that differ from the recipe's.
    """
    return copy.deepcopy(_quantized(architecture, recipe, budget, bits, fully, tuple(families.items())))


@functools.cache
def _quantized(
    architecture: str,
    recipe: str,
    budget: str,
    bits: tuple[int, ...],
    fully: bool,
    families: tuple[tuple[str, str], ...],
) -> GraphModule:
    model, size = built(architecture)
    calibration = images(4, size)
    options: dict[str, Any] = {"fully_quantized": True} if fully else {}
    pipeline = RECIPES[recipe](budget, bits=bits, allocator=Uniform(), **options)
    if families:
        pipeline = pipeline.changed(PlanOperands, **dict(families))
    return pipeline.run(traced(model, calibration), PassContext(calibration))


def lower(graph_module: GraphModule, backend: str = "cpu-native", chains: bool = False) -> GraphModule:
    """The graph in integers; the one that is given stays as it is."""
    return Pipeline([Lower(backend, chains)], assumes=[QUANTIZED]).run(graph_module, PassContext())


def note_bits(graph_module: GraphModule) -> None:
    """Let linear layers' annotations say what was put into their modules by hand."""
    for node in nodes_with_role(graph_module):
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, simulated.QuantizedLinear):
            weight_bits, inputs = module.operand_bits()
            annotate(node, operands=operands(weight_bits, *inputs))
