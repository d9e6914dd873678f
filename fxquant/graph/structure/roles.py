"""All roles of a graph at once: every layer is given a role, every near-miss is kept with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from fxquant.graph.annotation import Role
from fxquant.graph.structure.kind import Kind
from fxquant.graph.structure.pattern import (
    Attention,
    Failure,
    Mlp,
    first_layers,
    last_layers,
    match_attention,
    match_layer_norm,
    match_mlp,
    match_reduction,
    to_networkx,
)

_ACTIVATIONS = (Kind.GELU, Kind.ACTIVATION)


@dataclass
class Roles:
    """What was found: role and block of nodes by name, and patterns that did not hold.

    Args:
        role: the role of each node that has one, by the node's name.
        block: the index of the block that a node belongs to, by the node's name.
        failures: near-misses, each with its reason.
    """

    role: dict[str, Role] = field(default_factory=dict)
    block: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)


def find_roles(graph_module: fx.GraphModule) -> Roles:
    """Roles of all nodes of a traced graph.

    Every linear and convolution gets one; where patterns disagree the more specific wins: patch embedding and head,
    then attention, then MLP, then reduction, else LINEAR. Blocks are counted in graph order: an attention opens a
    block, and so does an MLP where the open block already has one.
    """
    graph = to_networkx(graph_module)
    roles = Roles()
    matches = _matches(graph, roles)
    block = -1
    has_mlp = True
    for match in matches:
        opens_block = isinstance(match, Attention) or has_mlp
        block += opens_block
        has_mlp = isinstance(match, Mlp) or (has_mlp and not opens_block)
        _assign(roles, match, block)
    blocked = set(roles.role)
    for role, names in ((Role.PATCH_EMBED, first_layers(graph)), (Role.HEAD, last_layers(graph, blocked))):
        for name in names:
            roles.role[name] = role
            roles.block.pop(name, None)
    for name, kind in graph.nodes(data="kind"):
        _assign_rest(graph, roles, name, kind)
    return roles


def _matches(graph: nx.DiGraph, roles: Roles) -> list[Attention | Mlp]:
    """Attentions and MLPs in graph order; attention first, so that its linears are no MLP's."""
    attentions = [match_attention(graph, name) for name, kind in graph.nodes(data="kind") if kind is Kind.SOFTMAX]
    by_product = {match.av: match for match in reversed(attentions) if isinstance(match, Attention)}
    found: list[Attention | Mlp] = list(by_product.values())  # softmaxes that are blended (ConViT) are one attention
    roles.failures += [match for match in attentions if isinstance(match, Failure)]
    in_attention = {name for match in found if isinstance(match, Attention) for name in (*match.qkv, *match.proj)}
    taken: set[str] = set()
    for name, kind in graph.nodes(data="kind"):
        if kind not in _ACTIVATIONS:
            continue
        match = match_mlp(graph, name)
        if isinstance(match, Failure):
            roles.failures += [match] if kind is Kind.GELU else []
        elif not in_attention & {*match.fc1, *match.fc2} and not taken & {*match.fc1, *match.fc2}:
            taken |= {*match.fc1, *match.fc2}
            found.append(match)
    position = nx.get_node_attributes(graph, "position")
    return sorted(found, key=lambda m: position[m.softmax if isinstance(m, Attention) else m.activation])


def _assign(roles: Roles, match: Attention | Mlp, block: int) -> None:
    pairs: list[tuple[str | None, Role]]
    if isinstance(match, Attention):
        pairs = [(match.softmax, Role.SOFTMAX), (match.qk, Role.QK), (match.av, Role.AV)]
        pairs += [(name, Role.QKV) for name in match.qkv]
        pairs += [(name, Role.PROJ) for name in match.proj[:1]]
        roles.role |= dict.fromkeys(match.mixers, Role.LINEAR)  # of no block, whose layers metrics know by role
    else:
        pairs = [*((name, Role.FC1) for name in match.fc1), *((name, Role.FC2) for name in match.fc2)]
    for name, role in pairs:
        if name is not None and name not in roles.role:
            roles.role[name] = role
            roles.block[name] = block


def _assign_rest(graph: nx.DiGraph, roles: Roles, name: str, kind: Kind) -> None:
    """Roles that need no block, and blocks of norms and activations from the layer beside them."""
    if name in roles.role:
        return
    if kind is Kind.GELU:
        roles.role[name] = Role.GELU
        _join_block(graph, roles, name)
    elif kind is Kind.LAYER_NORM:
        failure = match_layer_norm(graph, name)
        if failure is None:
            roles.role[name] = Role.LAYER_NORM
            _join_block(graph, roles, name)
        else:
            roles.failures.append(failure)
    elif kind is Kind.LINEAR:
        failure = match_reduction(graph, name)
        roles.role[name] = Role.REDUCTION if failure is None else Role.LINEAR
        roles.failures += [failure] if failure else []
    elif kind in (Kind.CONV, Kind.DEPTHWISE):
        roles.role[name] = Role.LINEAR
    elif kind is Kind.MATMUL and all(failure.node != name for failure in roles.failures):
        roles.failures.append(Failure(name, "the matmul is neither before nor after a softmax"))


def _join_block(graph: nx.DiGraph, roles: Roles, name: str) -> None:
    """The block of the nearest layer that reads the node (a norm or an activation opens the branch of its reader)."""
    for _, reader in nx.bfs_edges(graph, name, depth_limit=12):
        if graph.nodes[reader]["kind"] in (Kind.LINEAR, Kind.CONV):
            if reader in roles.block:
                roles.block[name] = roles.block[reader]
            return
