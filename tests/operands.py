"""Operands for tests: made by hand, and what was searched for them."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

from fxquant.graph.annotation import Annotation, Candidate, Operand, Source
from passes.pipeline.contract import PassContext
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands


def operands(*bits: int | None, weight: bool = True) -> tuple[Operand, ...]:
    """Operands of these widths: a weight and inputs, or inputs only."""
    first = [Operand(None, Source.WEIGHT, bits=bits[0])] if weight else []
    return (*first, *(Operand(i, Source.OTHER, bits=width) for i, width in enumerate(bits[len(first) :])))


def weight_candidates(annotation: Annotation) -> tuple[Candidate, ...]:
    """Of the weight; none where there is none."""
    return () if annotation.weight is None else annotation.weight.candidates


def input_candidates(annotation: Annotation) -> list[tuple[Candidate, ...]]:
    """Of every quantized input."""
    return [operand.candidates for operand in annotation.inputs if operand.candidates]


def plan_and_observe(graph_module: GraphModule, **options: Any) -> None:
    """Plan with these options, and put observers there."""
    PlanOperands(**options).apply(graph_module, PassContext())
    InsertObservers().apply(graph_module, PassContext())
