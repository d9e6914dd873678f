"""InsertObservers: decide what is quantized and with which family, and put an observer on each such edge.

A linear or convolution node gets one on its input, a matmul one on each operand; under the fully quantized protocol
softmax and LayerNorm get one on their input as well (MPTQ-ViT, Table 3). Which family an edge gets follows from what
flows over it: post-GELU values, post-Softmax values, everything else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.checks.hints import check_fields
from fxquant.errors import PatternError
from fxquant.graph.annotation import Role, annotation_of, nodes_with_role
from fxquant.graph.facts import ROLES_ASSIGNED, Fact, broken_at, missing
from fxquant.graph.names import add_module
from fxquant.quantizers.families import families_named
from fxquant.quantizers.observers import Edge, Observer
from passes.pipeline.contract import Effect, PassContext

_SHAPE_ONLY = frozenset(
    {"view", "reshape", "permute", "transpose", "contiguous", "flatten", "select", "unsqueeze", "squeeze"}
)


Place = tuple[Node, int]
"""A node and which of its arguments."""


def _check_observed(graph_module: GraphModule) -> None:
    """Observers are there, each on the input of a node that has a role."""
    found = observer_nodes(graph_module)
    if not found:
        raise missing("no edge has an observer", "InsertObservers")
    for node in found:
        if not any(annotation_of(user).role for user in node.users):
            raise broken_at(node, "no node with a role reads this observer", "run InsertObservers again")


OBSERVED = Fact("observed", _check_observed)
"""Edges to quantize carry observers, which nodes with roles read."""


@dataclass(frozen=True)
class InsertObservers:
    """Put observers on the edges to quantize. Each field names a family of `families.FAMILIES`.

    Two families with a bar between, "log2|twin-softmax": at every width the one of less predicted loss. "log2<=4": at 4
    bits and below only; an edge without a family at a width does not get that width.

    post_gelu, post_softmax: for values coming straight from GELU or softmax. image: for the patch embedding's input,
    None leaves it float. softmax_input, layer_norm_input: None keeps the two operators in float; naming a family makes
    the model fully quantized. other: everything else. roles: only nodes of these roles are quantized; None means all.
    """

    post_gelu: str = "opt-m"
    post_softmax: str = "twin-softmax"
    other: str = "symmetric"
    image: str | None = "symmetric"
    softmax_input: str | None = None
    layer_norm_input: str | None = None
    roles: tuple[Role, ...] | None = None

    requires: ClassVar[frozenset[Fact]] = frozenset({ROLES_ASSIGNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({OBSERVED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    effect: ClassVar[Effect] = Effect.EXACT

    def __post_init__(self) -> None:
        """Raise PatternError for options that do not fit."""
        check_fields(self, PatternError)
        chosen = (self.post_gelu, self.post_softmax, self.other, self.image, self.softmax_input, self.layer_norm_input)
        for named in chosen:
            if named is not None:
                families_named(named)

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Insert the observers (replacing earlier ones); returns how many."""
        earlier = _detach_observers(graph_module)
        count = 0
        for node in nodes_with_role(graph_module):
            has_weight = _has_weight(node)
            for index, edge, family in self.plan(node):
                _insert(graph_module, node, index, Observer(family, edge, gram=has_weight), earlier)
                count += 1
        _erase(graph_module, earlier.values())
        graph_module.graph.lint()
        graph_module.recompile()
        return count

    def plan(self, node: Node) -> list[tuple[int, Edge, str | None]]:
        """Inputs of the node that get an observer: argument index, what flows there, family (None: stays float).

        Raises PatternError for a convolution that does not pad with zeros.
        """
        role = annotation_of(node).role
        if role is None or role is Role.GELU or (self.roles is not None and role not in self.roles):
            return []
        _refuse_padding_mode(node)
        planned = []
        for index in range(2 if role.is_matmul else 1):
            source = node.args[index]
            if isinstance(source, Node):
                edge = edge_of(node, source)
                family = self.family_of(edge)
                if family is not None or role.has_weight:
                    planned.append((index, edge, family))
        return planned

    def family_of(self, edge: Edge) -> str | None:
        """The family for an edge; None where it stays float."""
        families = {
            Edge.POST_GELU: self.post_gelu,
            Edge.POST_SOFTMAX: self.post_softmax,
            Edge.IMAGE: self.image,
            Edge.SOFTMAX_INPUT: self.softmax_input,
            Edge.LAYER_NORM_INPUT: self.layer_norm_input,
        }
        return families.get(edge, self.other)


def _refuse_padding_mode(node: Node) -> None:
    graph_module = node.graph.owning_module
    module = graph_module.get_submodule(str(node.target)) if graph_module and node.op == "call_module" else None
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros":
        raise PatternError(f"convolution {node.target} pads with {mode!r}; only padding_mode='zeros' can be quantized")


def _has_weight(node: Node) -> bool:
    role = annotation_of(node).role
    return role is not None and role.has_weight


def edge_of(node: Node, source: Node) -> Edge:
    """What flows from source into node, looking through operations that only change shape."""
    role = annotation_of(node).role
    if role is Role.SOFTMAX:
        return Edge.SOFTMAX_INPUT
    if role is Role.LAYER_NORM:
        return Edge.LAYER_NORM_INPUT
    while source.op == "call_method" and source.target in _SHAPE_ONLY and isinstance(source.args[0], Node):
        source = source.args[0]
    if source.op == "placeholder":
        return Edge.IMAGE
    produced = {Role.GELU: Edge.POST_GELU, Role.SOFTMAX: Edge.POST_SOFTMAX, Role.LAYER_NORM: Edge.POST_LAYER_NORM}
    producer = annotation_of(source).role
    return produced.get(producer, Edge.OTHER) if producer else Edge.OTHER


def observer_nodes(graph_module: GraphModule) -> list[Node]:
    """All observer nodes, in graph order."""
    modules = dict(graph_module.named_modules())
    return [n for n in graph_module.graph.nodes if n.op == "call_module" and isinstance(modules[n.target], Observer)]


def observers_of(graph_module: GraphModule, node: Node) -> list[tuple[int, Observer]]:
    """Observers on the node's inputs: (argument index, observer)."""
    modules: dict[str, nn.Module] = dict(graph_module.named_modules())
    found = []
    for index, source in enumerate(node.args):
        if isinstance(source, Node) and source.op == "call_module":
            module = modules[str(source.target)]
            if isinstance(module, Observer):
                found.append((index, module))
    return found


def remove_observers(graph_module: GraphModule) -> int:
    """Take every observer out again; returns how many there were."""
    detached = _detach_observers(graph_module)
    _erase(graph_module, detached.values())
    if detached:
        graph_module.recompile()
    return len(detached)


def _detach_observers(graph_module: GraphModule) -> dict[Place, Node]:
    """Let the reader of every observer read its source instead; returns the observer nodes by where they were."""
    detached = {_place_of(node): node for node in observer_nodes(graph_module)}
    for node in detached.values():
        node.replace_all_uses_with(node.all_input_nodes[0])
    return detached


def _place_of(observed: Node) -> Place:
    """The node that reads an observer, itself where none does, and as which argument."""
    return next(((reader, reader.args.index(observed)) for reader in observed.users), (observed, 0))


def _erase(graph_module: GraphModule, nodes: Iterable[Node]) -> None:
    for node in nodes:
        graph_module.graph.erase_node(node)
        graph_module.delete_submodule(str(node.target))


def _insert(graph_module: GraphModule, node: Node, index: int, observer: Observer, earlier: dict[Place, Node]) -> None:
    """Put the observer on one input; the node that an earlier one had there is used again, so names stay."""
    source = node.args[index]
    observed = earlier.pop((node, index), None)
    if observed is None:
        name = add_module(graph_module, f"observer_{annotation_of(node).layer.replace('.', '_')}_{index}", observer)
        observed = graph_module.graph.create_node("call_module", name)
    else:
        graph_module.add_submodule(str(observed.target), observer)
    observed.args = (source,)
    node.prepend(observed)
    observed.meta["tensor_meta"] = source.meta.get("tensor_meta") if isinstance(source, Node) else None
    node.update_arg(index, observed)
