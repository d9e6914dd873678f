"""What passes write on graph nodes and read from them: roles, bits, quantizers.

The `Annotation` in `node.meta` is the only channel between passes that decide (roles, bits) and passes that act
(substitution, lowering). It is frozen: `annotate` replaces it. It survives `copy.deepcopy` of the graph module, not
pickling and not re-tracing; what must outlive the process goes into the Allocation and the artefact. What is true of a
whole graph are facts (`fxquant.graph.facts`), what is known of it are notes (`fxquant.graph.notes`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from fxquant.quantizers.quantizer import Quantizer

_ANNOTATION = "fxquant"
SOFTMAX = ".softmax"
"""Behind a layer's name: its attention probabilities, where they have bits of their own."""


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

    bits: width in bits. quantizer: the module that quantizes. loss: predicted loss of the whole model when only this
    tensor is quantized so (KL divergence per image in nats under the Hessian-guided metric, squared error under
    plain MSE). noise: sum of squared quantization error; signal: sum of squares (both per calibration set).
    """

    bits: int
    quantizer: Quantizer
    loss: float
    noise: float
    signal: float


@dataclass(frozen=True, slots=True)
class Annotation:
    """Everything passes know about one node. Each field is written by one pass, named beside it."""

    role: Role | None = None  # AssignRoles
    layer: str = ""  # AssignRoles: the public name, e.g. "blocks.3.mlp.fc1", "blocks.3.attn.qk"
    block: int | None = None  # AssignRoles: index of the transformer block, in graph order
    parameters: int = 0  # AssignRoles: elements of the weight
    macs: int = 0  # AssignRoles: multiply-accumulates for one image
    activation_elements: int = 0  # AssignRoles: elements of all quantizable inputs for one image
    left_elements: int = 0  # AssignRoles: of these, elements of the left input of a matmul
    weight_candidates: tuple[Candidate, ...] = ()  # SearchScales, ascending bits
    activation_candidates: tuple[tuple[Candidate, ...], ...] = ()  # SearchScales, Reconstruct; a tuple per input
    weight_sensitivity: tuple[float, ...] = ()  # ScoreLayers, one per candidate; empty: the candidates' losses count
    activation_sensitivity: tuple[float, ...] = ()  # ScoreLayers, one per candidate, all inputs together
    weight_bits: int | None = None  # AllocateBits
    activation_bits: int | None = None  # AllocateBits
    left_bits: int | None = None  # AllocateBits: of a matmul's left input; None: the same as activation_bits
    pinned: bool = False  # AllocateBits: bits were fixed by an override or the first/last policy

    @property
    def has_bits(self) -> bool:
        """Whether anything of the node is to compute in bits."""
        return self.weight_bits is not None or self.activation_bits is not None

    @property
    def input_bits(self) -> tuple[int | None, ...]:
        """Bits of every input that has candidates, in the order of `activation_candidates`."""
        bits = [self.activation_bits] * len(self.activation_candidates)
        if self.left_bits is not None and bits:
            bits[0] = self.left_bits
        return tuple(bits)


def input_label(activation_bits: int | None, left_bits: int | None) -> str:
    """Bits of inputs in short: `4`, `2x4` for a matmul's left and right input where they differ, `-` for none."""
    left = "" if left_bits in (None, activation_bits) else f"{left_bits}x"
    return "-" if activation_bits is None else f"{left}{activation_bits}"


def annotation_of(node: Node) -> Annotation:
    """The node's annotation, an empty one where no pass has written any."""
    found = node.meta.get(_ANNOTATION)
    return found if isinstance(found, Annotation) else Annotation()


def annotate(node: Node, **changes: Any) -> Annotation:
    """Replace fields of the node's annotation and return the new one."""
    node.meta[_ANNOTATION] = replace(annotation_of(node), **changes)
    return annotation_of(node)


def nodes_with_role(graph_module: GraphModule, *roles: Role) -> list[Node]:
    """Nodes of the given roles (any role when none is given), in graph order."""
    wanted = set(roles) or set(Role)
    return [node for node in graph_module.graph.nodes if annotation_of(node).role in wanted]
