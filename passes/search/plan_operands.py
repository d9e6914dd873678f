"""PlanOperands: decide which tensors are quantized, and of which families their quantizers may be.

A linear layer or a convolution multiplies its weight and its input, an attention matmul its left and its right input;
under the fully quantized protocol softmax and LayerNorm read a quantized input as well (MPTQ-ViT, Table 3). Which
families an input gets follows from what it holds: values after GELU, after ReLU (none below zero), after softmax,
everything else.

Only annotations are written, before any image is needed: whether a budget can be met follows from them (CheckBudget).
InsertObservers puts the observers where a plan says so.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from fxquant.checks.hints import check_fields
from fxquant.errors import PatternError
from fxquant.graph.annotation import (
    Allowed,
    Operand,
    Role,
    Source,
    annotate,
    annotation_of,
    nodes_with_role,
    planned_nodes,
)
from fxquant.graph.facts import ROLES_ASSIGNED, Fact, broken_at, missing
from fxquant.graph.nodes import elements_of, module_of, shape_of
from fxquant.quantizers.families import FAMILIES, families_named
from fxquant.quantizers.observers import Observer
from passes.pipeline.contract import PassContext

_SHAPE_ONLY = frozenset(
    {"view", "reshape", "permute", "transpose", "contiguous", "flatten", "select", "unsqueeze", "squeeze"}
)
_RELUS = frozenset({functional.relu, functional.relu6, torch.relu, "relu", "relu_"})
WITHOUT_ROWS = "asymmetric"
"""What probabilities become whose rows do not lie along the last axis, where only families of rows are named."""

_INPUTS = {Role.SOFTMAX: Source.SOFTMAX_INPUT, Role.LAYER_NORM: Source.LAYER_NORM_INPUT}
_PRODUCED = {Role.GELU: Source.POST_GELU, Role.SOFTMAX: Source.POST_SOFTMAX, Role.LAYER_NORM: Source.POST_LAYER_NORM}


def _check_planned(graph_module: GraphModule) -> None:
    """Something is to be quantized, and every input is an argument of its node."""
    nodes = planned_nodes(graph_module)
    if not nodes:
        raise missing("nothing is to be quantized", "PlanOperands")
    for node in nodes:
        for operand in annotation_of(node).inputs:
            if operand.argument not in range(len(node.args)):
                raise broken_at(node, f"it has no argument {operand.argument} to quantize", "run PlanOperands again")


OPERANDS_PLANNED = Fact("operands planned", _check_planned, rests_on=frozenset({ROLES_ASSIGNED}))
"""Every node with a role says what it multiplies or reads, and what may become of it."""


@dataclass(frozen=True)
class PlanOperands:
    """Say what is quantized. Each field but the last two names families of `families.FAMILIES`.

    Two families with a bar between, "log2|twin-softmax": at every width the one of less predicted loss. "log2<=4": at 4
    bits and below only; an operand without a family at a width does not get that width.

    Args:
        post_gelu, post_softmax: for values coming straight from GELU or softmax; None leaves those of a softmax float.
        post_relu: for values after ReLU, of which a symmetric quantizer would waste half its codes.
        other: for all other inputs.
        image: for the patch embedding's input; None leaves it float.
        softmax_input, layer_norm_input: None keeps the two operators in float; families make the model fully quantized.
        weight: for weights; "asymmetric" gives them zero-points, which no kernel takes, so such layers stay simulated;
            None leaves them float, so that inputs alone are quantized.
        tied: products whose two inputs share one width; the others' inputs have widths of their own.
        roles: only nodes of these roles are quantized; None means all.
    """

    post_gelu: str = "opt-m"
    post_softmax: str | None = "twin-softmax"
    post_relu: str = "asymmetric"
    other: str = "symmetric"
    image: str | None = "symmetric"
    softmax_input: str | None = None
    layer_norm_input: str | None = None
    weight: str | None = "symmetric"
    tied: tuple[Role, ...] = (Role.QK, Role.AV)
    roles: tuple[Role, ...] | None = None

    requires: ClassVar[frozenset[Fact]] = frozenset({ROLES_ASSIGNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({OPERANDS_PLANNED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def __post_init__(self) -> None:
        """Raise PatternError for options that do not fit."""
        check_fields(self, PatternError)
        for source in Source:
            self.families_of(source)
        if self.weight not in ("symmetric", "asymmetric", None):
            raise PatternError(f"weights are quantized 'symmetric' or 'asymmetric', or not at all, not {self.weight!r}")

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Annotate operands, forgetting earlier ones; returns how many of them are to be quantized.

        Raises PatternError for a convolution that does not pad with zeros.
        """
        count = 0
        for node in nodes_with_role(graph_module):
            operands = self.operands(node)
            annotate(node, operands=operands)
            count += sum(bool(operand.families) for operand in operands)
        return count

    def operands(self, node: Node) -> tuple[Operand, ...]:
        """The operands of a node that has a role; those that stay float have no families."""
        role = annotation_of(node).role
        found = tuple(_operands(node))
        if role is None or role is Role.GELU or (self.roles is not None and role not in self.roles):
            return found
        _refuse_padding_mode(node)
        return tuple(
            replace(operand, families=self._families(node, operand), tied=role.is_matmul and role in self.tied)
            for operand in found
        )

    def _families(self, node: Node, operand: Operand) -> tuple[Allowed, ...]:
        """The families of one operand; those of rows only where its rows are a softmax's."""
        named = self.families_of(operand.source)
        if operand.source is not Source.POST_SOFTMAX or operand.argument is None or _has_rows(node, operand.argument):
            return named
        return tuple(family for family in named if not FAMILIES[family.name].of_rows) or families_named(WITHOUT_ROWS)

    def families_of(self, source: Source) -> tuple[Allowed, ...]:
        """The families for what an operand holds; none where it stays float."""
        named = {
            Source.WEIGHT: self.weight,
            Source.POST_GELU: self.post_gelu,
            Source.POST_RELU: self.post_relu,
            Source.POST_SOFTMAX: self.post_softmax,
            Source.IMAGE: self.image,
            Source.SOFTMAX_INPUT: self.softmax_input,
            Source.LAYER_NORM_INPUT: self.layer_norm_input,
        }.get(source, self.other)
        return () if named is None else families_named(named)


def _operands(node: Node) -> Iterator[Operand]:
    """The weight, then the inputs: both of a matmul (twice the same node counts twice), the first of anything else."""
    role = annotation_of(node).role
    graph_module = node.graph.owning_module
    assert graph_module is not None
    if role is not None and role.has_weight:
        module: Any = graph_module.get_submodule(str(node.target))
        yield Operand(None, Source.WEIGHT, int(module.weight.numel()))
    for index, source in enumerate(node.args[: 2 if role is not None and role.is_matmul else 1]):
        if isinstance(source, Node):
            yield Operand(index, source_of(node, source), elements_of(source))


def source_of(node: Node, source: Node) -> Source:
    """What flows from source into node, looking through operations that only change shape, and through observers."""
    role = annotation_of(node).role
    if role in _INPUTS:
        return _INPUTS[role]
    while _passes_on(source) and isinstance(source.args[0], Node):
        source = source.args[0]
    if source.op == "placeholder" or _is_part_of_image(source):
        return Source.IMAGE
    producer = annotation_of(source).role
    if producer is None and _is_relu(source):
        return Source.POST_RELU
    return _PRODUCED.get(producer, Source.OTHER) if producer else Source.OTHER


def _has_rows(node: Node, argument: int) -> bool:
    """Whether the last axis of an input is the one along which a softmax has made its numbers sum to 1.

    A product with the probabilities on its right, values @ probabilities.mT, has their columns there.
    """
    source = node.args[argument]
    while isinstance(source, Node) and _passes_on(source):
        before = source.args[0]
        if not isinstance(before, Node) or not _keeps_last_axis(source, before):
            return False
        source = before
    module = module_of(node.graph.owning_module, source) if isinstance(source, Node) else None  # type: ignore[arg-type]
    shape = shape_of(source)
    return isinstance(module, nn.Softmax) and shape is not None and module.dim in (-1, len(shape) - 1)


def _keeps_last_axis(node: Node, before: Node) -> bool:
    """Whether what only changes a shape leaves the last axis of its input as it is, and in its place."""
    shape, was = shape_of(node), shape_of(before)
    if shape is None or was is None or not was or shape[-1:] != was[-1:]:
        return False
    given = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
    lasts = [isinstance(axis, int) and axis % len(was) == len(was) - 1 for axis in given]
    if node.target == "transpose":
        return not any(lasts)
    if node.target == "permute":
        return lasts[-1:] == [True]
    return node.op == "call_module" or node.target in ("view", "reshape", "flatten", "contiguous")


def _is_part_of_image(node: Node) -> bool:
    """Whether a node gives some planes of the images."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and source.op == "placeholder"


def _is_relu(node: Node) -> bool:
    """Whether a node gives nothing below zero: what its input has there is zero."""
    if node.op == "call_module" and node.graph.owning_module is not None:
        return isinstance(node.graph.owning_module.get_submodule(str(node.target)), nn.ReLU | nn.ReLU6)
    return node.target in _RELUS


def _passes_on(node: Node) -> bool:
    """Whether a node gives the values that it reads."""
    if node.op == "call_module" and node.graph.owning_module is not None:
        return isinstance(node.graph.owning_module.get_submodule(str(node.target)), Observer)
    return node.op == "call_method" and node.target in _SHAPE_ONLY


def _refuse_padding_mode(node: Node) -> None:
    graph_module = node.graph.owning_module
    module = graph_module.get_submodule(str(node.target)) if graph_module and node.op == "call_module" else None
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros":
        raise PatternError(f"convolution {node.target} pads with {mode!r}; only padding_mode='zeros' can be quantized")
