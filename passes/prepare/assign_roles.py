"""Write on every node what it does (qkv, fc1, softmax, ...), its public name and what it costs.

Patterns decide, not names (`fxquant.graph.structure.pattern`). Multiply-accumulates, for one image: every output
element of a linear or a convolution costs weight elements / output channels, every output element of a matmul costs the
length of the summed axis. Not counted: norms, softmax, activations, biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

from torch import fx

from fxquant.graph.annotation import Role, annotate, annotation_of
from fxquant.graph.facts import ROLES_ASSIGNED, TRACED, Fact, declare
from fxquant.graph.nodes import elements_of, scope_of
from fxquant.graph.structure.roles import find_roles
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class AssignRoles:
    """Annotate role, layer, block and macs.

    Idempotent. Notes `unmatched`: [{"node", "reason"}], operations that look like part of a pattern but are not.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({TRACED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ROLES_ASSIGNED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: fx.GraphModule, context: PassContext) -> int:
        """Annotate in place; returns the number of nodes that have a role."""
        roles = find_roles(graph_module)
        names = _public_names(graph_module, roles.role)
        for node in graph_module.graph.nodes:
            role = roles.role.get(node.name)
            if role is None:
                if annotation_of(node).role is not None:
                    annotate(node, role=None, layer="", block=None, macs=0)
                continue
            annotate(
                node,
                role=role,
                layer=names[node],
                block=roles.block.get(node.name),
                macs=_macs(node, role),
            )
        context.note(unmatched=[{"node": failure.node, "reason": failure.reason} for failure in roles.failures])
        declare(graph_module, self.provides, self.breaks)
        return len(roles.role)


def _public_names(graph_module: fx.GraphModule, roles: Mapping[str, Role]) -> dict[fx.Node, str]:
    """A name of its own for every node with a role; the second of one name is called `name_1`, if no other is."""
    nodes = [node for node in graph_module.graph.nodes if node.name in roles]
    wanted = {node: _public_name(node, roles[node.name]) for node in nodes}
    taken, names = set(wanted.values()), dict[fx.Node, str]()
    for node, name in wanted.items():
        if name in names.values():
            name = next(other for number in count(1) if (other := f"{name}_{number}") not in taken)
            taken.add(name)
        names[node] = name
    return names


def _public_name(node: fx.Node, role: Role) -> str:
    """The module's path; for a function, the path of the module that calls it and the role."""
    if node.op == "call_module":
        return str(node.target)
    return scope_of(node) if role is Role.GELU else f"{scope_of(node)}.{role}".lstrip(".")


def _macs(node: fx.Node, role: Role) -> int:
    """Multiply-accumulates for one image."""
    graph_module = node.graph.owning_module
    if role.has_weight and graph_module is not None:
        module: Any = graph_module.get_submodule(str(node.target))
        channels = getattr(module, "out_features", None) or module.out_channels
        return elements_of(node) * int(module.weight.numel()) // int(channels)
    if role.is_matmul:
        return elements_of(node) * int(node.args[0].meta["tensor_meta"].shape[-1])  # type: ignore[union-attr]
    return 0
