"""What passes write on graph nodes and read from them: roles, bits, quantizers.

The `Annotation` in `node.meta` is the only channel between passes that decide (roles, bits) and passes that act
(substitution, lowering). It is frozen: `annotate` replaces it. It survives `copy.deepcopy` of the graph module, not
pickling and not re-tracing; what must outlive the process goes into the Allocation and the artefact. What is true of a
whole graph are facts (`fxquant.graph.facts`), what is known of it are notes (`fxquant.graph.notes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from fxquant.quantizers.quantizer import Quantizer

_ANNOTATION = "fxquant"


class Role(StrEnum):
    """What a node does in a Vision Transformer."""

    QKV = "qkv"
    PROJ = "proj"
    FC1 = "fc1"
    FC2 = "fc2"
    PATCH_EMBED = "patch_embed"
    HEAD = "head"
    REDUCTION = "reduction"
    LINEAR = "linear"
    QK = "qk"
    AV = "av"
    SOFTMAX = "softmax"
    GELU = "gelu"
    LAYER_NORM = "layer_norm"

    @property
    def has_weight(self) -> bool:
        """Whether nodes of this role multiply by a weight of their own (linear and convolution)."""
        return self in WEIGHT_ROLES

    @property
    def is_matmul(self) -> bool:
        """Whether nodes of this role multiply two activations."""
        return self in (Role.QK, Role.AV)


WEIGHT_ROLES = frozenset(
    {Role.QKV, Role.PROJ, Role.FC1, Role.FC2, Role.PATCH_EMBED, Role.HEAD, Role.REDUCTION, Role.LINEAR}
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One quantizer found for one tensor at one width.

    Args:
        bits: the width of the codes that this quantizer gives.
        quantizer: the module that quantizes the operand.
        loss: predicted loss of the whole model when only this tensor is quantized so (KL divergence per image in nats
            under the Hessian-guided metric, squared error under plain MSE).
        noise: the sum over all values of the squared quantization error.
        signal: sum of squares (both per calibration set).
    """

    bits: int
    quantizer: Quantizer
    loss: float
    noise: float
    signal: float

    @property
    def noise_ratio(self) -> float:
        """Noise relative to the signal; finite where there is no signal."""
        return self.noise / max(self.signal, 1e-30)


class Source(StrEnum):
    """What an operand holds; decides which family of quantizer fits."""

    WEIGHT = "weight"
    POST_GELU = "post_gelu"
    POST_RELU = "post_relu"
    POST_SOFTMAX = "post_softmax"
    POST_LAYER_NORM = "post_layer_norm"
    SOFTMAX_INPUT = "softmax_input"
    LAYER_NORM_INPUT = "layer_norm_input"
    IMAGE = "image"
    OTHER = "other"


class Allowed(NamedTuple):
    """A quantizer family's name and the widest width, in bits, at which it may be used."""

    name: str
    widest_bits: int


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor that a node multiplies or reads. Each field is written by one pass, named beside it.

    Args:
        argument: index in node.args; None: the weight. Written by PlanOperands.
        source: what flows here. Written by PlanOperands.
        elements: of one image; of a weight, its own. Written by PlanOperands.
        families: what its quantizer may be; empty: it stays float. Written by PlanOperands.
        tied: whether it is an input of a product that shares its width with the other one. Written by PlanOperands.
        candidates: quantizers found, ascending by bits. Written by SearchScales; Reconstruct and Distil replace some.
        scores: one per candidate; empty: the candidates' losses count. Written by ScoreLayers.
        bits: the width it was given; None: it stays float. Written by AllocateBits.
        pinned: whether its bits were fixed by an override or a policy. Written by AllocateBits.
    """

    argument: int | None  # PlanOperands: index in node.args; None: the weight
    source: Source  # PlanOperands
    elements: int = 0  # PlanOperands: of one image; of a weight, its own
    families: tuple[Allowed, ...] = ()  # PlanOperands: what its quantizer may be; empty: it stays float
    tied: bool = False  # PlanOperands: an input of a product that shares its width with the other one
    candidates: tuple[Candidate, ...] = ()  # SearchScales, Reconstruct, Distil; ascending bits
    scores: tuple[float, ...] = ()  # ScoreLayers, one per candidate; empty: the candidates' losses count
    bits: int | None = None  # AllocateBits
    pinned: bool = False  # AllocateBits: its bits were fixed by an override or a policy

    @property
    def widest_bits(self) -> int:
        """The widest width that one of its families may have; 0 where it stays float."""
        return max((family.widest_bits for family in self.families), default=0)


@dataclass(frozen=True, slots=True)
class Annotation:
    """Everything passes know about one node. Each field is written by one pass, named beside it.

    Args:
        role: what the node does. Written by AssignRoles.
        layer: the public name, such as "blocks.3.mlp.fc1" or "blocks.3.attn.qk". Written by AssignRoles.
        block: index of the transformer block, in graph order; None outside. Written by AssignRoles.
        macs: multiply-accumulates for one image. Written by AssignRoles.
        operands: a weight and its input, a left and a right input, or the only input. Written by PlanOperands.
    """

    role: Role | None = None  # AssignRoles
    layer: str = ""  # AssignRoles: the public name, e.g. "blocks.3.mlp.fc1", "blocks.3.attn.qk"
    block: int | None = None  # AssignRoles: index of the transformer block, in graph order
    macs: int = 0  # AssignRoles: multiply-accumulates for one image
    operands: tuple[Operand, ...] = ()  # PlanOperands: weight and input, left and right input, or the only input

    @property
    def weight(self) -> Operand | None:
        """The weight; None where the node has none."""
        return next((operand for operand in self.operands if operand.argument is None), None)

    @property
    def inputs(self) -> tuple[Operand, ...]:
        """All operands but the weight."""
        return tuple(operand for operand in self.operands if operand.argument is not None)

    @property
    def groups(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indices of the operands that share one width: a weight or a left input; an input, a right one or tied ones.

        So every node has at most two widths to choose, in the order of a cost table's rows.
        """
        count = len(self.operands)
        is_pair = count == 2 and not any(operand.tied for operand in self.operands)
        if is_pair or self.weight is not None:
            return tuple(range(count))[:1], tuple(range(count))[1:]
        return (), tuple(range(count))

    @property
    def bits(self) -> tuple[int | None, ...]:
        """The width of every operand; None where it stays float."""
        return tuple(operand.bits for operand in self.operands)

    @property
    def weight_bits(self) -> int | None:
        """The width of the weight; None without one, and where it stays float."""
        return None if self.weight is None else self.weight.bits

    @property
    def input_bits(self) -> tuple[int | None, ...]:
        """The width of every input; None where it stays float."""
        return tuple(operand.bits for operand in self.inputs)

    @property
    def has_bits(self) -> bool:
        """Whether anything of the node is to compute in bits."""
        return any(bits is not None for bits in self.bits)

    @property
    def is_planned(self) -> bool:
        """Whether anything of the node is to be quantized."""
        return any(operand.families for operand in self.operands)


def input_label(bits: Sequence[int | None]) -> str:
    """Widths of a node's inputs in short: `4`, `2x4` for a left and a right one that differ, `-` for none."""
    found = list(dict.fromkeys("-" if width is None else str(width) for width in bits))
    return "x".join(found) or "-"


def annotation_of(node: Node) -> Annotation:
    """The node's annotation, an empty one where no pass has written any."""
    found = node.meta.get(_ANNOTATION)
    return found if isinstance(found, Annotation) else Annotation()


def annotate(node: Node, **changes: Any) -> Annotation:
    """Replace fields of the node's annotation and return the new one."""
    node.meta[_ANNOTATION] = replace(annotation_of(node), **changes)
    return annotation_of(node)


def annotate_operands(node: Node, **changes: Sequence[Any]) -> Annotation:
    """Replace fields of the node's operands: one value for each operand, in their order."""
    operands = annotation_of(node).operands
    rows = [dict(zip(changes, values, strict=True)) for values in zip(*changes.values(), strict=True)]
    return annotate(node, operands=tuple(replace(o, **row) for o, row in zip(operands, rows, strict=True)))


def planned_nodes(graph_module: GraphModule) -> list[Node]:
    """Nodes of which anything is to be quantized, in graph order."""
    return [node for node in nodes_with_role(graph_module) if annotation_of(node).is_planned]


def nodes_with_role(graph_module: GraphModule, *roles: Role) -> list[Node]:
    """Nodes of the given roles (any role when none is given), in graph order."""
    wanted = set(roles) or set(Role)
    return [node for node in graph_module.graph.nodes if annotation_of(node).role in wanted]
