"""InsertObservers: put an observer on every input that a plan says is quantized.

The inputs of quantized weights get one where they stay float as well: correcting a weight takes their Gram matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fxquant.graph.annotation import annotation_of, planned_nodes
from fxquant.graph.facts import Fact, broken_at, missing
from fxquant.graph.names import add_module
from fxquant.quantizers.observers import Observer
from passes.pipeline.contract import Effect, PassContext
from passes.search.plan_operands import OPERANDS_PLANNED

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


OBSERVED = Fact("observed", _check_observed, rests_on=frozenset({OPERANDS_PLANNED}))
"""Edges to quantize carry observers, which nodes with roles read."""


@dataclass(frozen=True)
class InsertObservers:
    """Put observers on the inputs of nodes of which anything is to be quantized, as PlanOperands has written."""

    requires: ClassVar[frozenset[Fact]] = frozenset({OPERANDS_PLANNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({OBSERVED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Insert the observers (replacing earlier ones); returns how many."""
        earlier = _detach_observers(graph_module)
        count = 0
        for node in planned_nodes(graph_module):
            annotation = annotation_of(node)
            has_weight = annotation.weight is not None
            for operand in annotation.inputs:
                if operand.argument is not None and (operand.families or has_weight):
                    observer = Observer(operand.families, operand.source, gram=has_weight)
                    _insert(graph_module, node, operand.argument, observer, earlier)
                    count += 1
        _erase(graph_module, earlier.values())
        graph_module.graph.lint()
        graph_module.recompile()
        return count


def observer_nodes(graph_module: GraphModule) -> list[Node]:
    """All observer nodes, in graph order."""
    modules = dict(graph_module.named_modules())
    return [n for n in graph_module.graph.nodes if n.op == "call_module" and isinstance(modules[n.target], Observer)]


def observers_of(graph_module: GraphModule, node: Node) -> list[tuple[int, Observer]]:
    """Observers on the node's inputs: (argument index, observer)."""
    found = []
    for index, source in enumerate(node.args):
        if isinstance(source, Node) and source.op == "call_module":
            module = graph_module.get_submodule(str(source.target))
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
