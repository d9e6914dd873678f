"""Facts: what is true of a whole graph, each with the check that finds out whether it is.

A pass requires facts, provides facts and breaks facts. A fact is a constant beside the pass that provides it:

    SORTED = Fact("sorted", check_sorted)

Its check looks at the graph, its annotations and its notes; it runs nothing, and it does not believe the declaration:
it looks for what the pass leaves behind. A pipeline verifies what a pass requires before it runs, and what it provides
afterwards. A fact that is needed in several rooms stands in the lowest of them. The four below say what a graph
computes in, and what a file can show of a graph: tracing, files, exports and proofs ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import fx, nn

from fxquant.errors import VerificationError
from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.graph.nodes import module_of
from fxquant.graph.notes import EXECUTION, FACTS
from fxquant.graph.printer import describe

_SHAPED = frozenset({"placeholder", "call_module", "get_attr"})


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that is true of a whole graph.

    Args:
        name: how messages and files call it, a past participle.
        check: raises VerificationError, best made by `broken_at` or `missing`, where the graph shows that the fact does
            not hold.
        rests_on: facts that it was established on; when one of these is provided anew, this one no longer holds, as
            scales do not after another calibration.
    """

    name: str
    check: Callable[[fx.GraphModule], None] = field(repr=False)
    rests_on: frozenset[Fact] = field(default=frozenset(), repr=False)

    def __str__(self) -> str:
        return self.name

    def falls_with(self, provided: Iterable[Fact]) -> bool:
        """Whether this fact rests on one of these, directly or through others."""
        new = frozenset(provided)
        return any(ground in new or ground.falls_with(new) for ground in self.rests_on)


def facts_of(graph_module: fx.GraphModule) -> frozenset[Fact]:
    """What passes have declared true of this graph."""
    return FACTS.get(graph_module) or frozenset()


def declare(graph_module: fx.GraphModule, provided: Iterable[Fact], broken: Iterable[Fact] = ()) -> None:
    """Record that facts hold now, and that others no longer do.

    Args:
        graph_module: the graph.
        provided: facts that hold from now on; what rests on one of them no longer does.
        broken: facts that no longer hold.
    """
    FACTS.write(graph_module, known_after(facts_of(graph_module), provided, broken))


def known_after(known: Iterable[Fact], provided: Iterable[Fact], broken: Iterable[Fact]) -> frozenset[Fact]:
    """The facts that hold after a pass.

    Args:
        known: facts that held before it.
        provided: facts that it establishes; what rests on one of them falls.
        broken: facts that it says no longer hold.
    """
    provided, broken = frozenset(provided), frozenset(broken)
    return frozenset(fact for fact in known if fact not in broken and not fact.falls_with(provided)) | provided


def verify(graph_module: fx.GraphModule, fact: Fact) -> None:
    """Check that a fact is declared and holds.

    Raises VerificationError naming the fact, the node that breaks it, and what to do.
    """
    if fact not in facts_of(graph_module):
        raise VerificationError(f"'{fact}' is not declared: run the pass that provides it first")
    try:
        fact.check(graph_module)
    except VerificationError as error:
        raise VerificationError(f"'{fact}' does not hold: {error}") from error


def broken_at(node: fx.Node, problem: str, remedy: str) -> VerificationError:
    """The error of a check that finds a node at fault.

    Args:
        node: the first node that breaks the fact; the message prints it.
        problem: what is wrong with the node, as a clause of a sentence.
        remedy: what to do about it, as an imperative.
    """
    return VerificationError(f"at `{describe(node)}`, {problem}; {remedy}")


def missing(problem: str, passes: str) -> VerificationError:
    """The error of a check that does not find what passes of these names leave behind."""
    return VerificationError(f"{problem}; run {passes} first")


@runtime_checkable
class ComputesInBits(Protocol):
    """What a check reads of a quantized module; the modules themselves are in `fxquant.runtime.simulated`."""

    def operand_bits(self) -> tuple[int | None, tuple[int | None, ...]]:
        """Width of the weight, and of every input; None where one stays float or is not there."""


def _check_traced(graph_module: fx.GraphModule) -> None:
    """The graph is well formed, nodes have shapes, and none is left over."""
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"{error}; fix the pass that ran last") from error
    for node in graph_module.graph.nodes:
        if node.op in _SHAPED and "tensor_meta" not in node.meta:
            raise broken_at(node, "it has no tensor_meta", "a pass that adds nodes writes their shapes")
        if not node.users and not node.is_impure():
            raise broken_at(node, "nothing uses it", "erase nodes that a pass leaves without users")


def _check_roles(graph_module: fx.GraphModule) -> None:
    """Every layer has a role, and every node with a role has a name of its own."""
    names: dict[str, fx.Node] = {}
    for node in graph_module.graph.nodes:
        annotation = annotation_of(node)
        if annotation.role is None:
            if node.op == "call_module" and _is_layer(graph_module.get_submodule(str(node.target))):
                raise broken_at(node, "a layer has no role", "run AssignRoles again")
            continue
        if annotation.layer in names:
            other = describe(names[annotation.layer])
            raise broken_at(node, f"the name '{annotation.layer}' is that of `{other}` too", "rename one")
        if not annotation.layer:
            raise broken_at(node, "it has no public name", "run AssignRoles again")
        names[annotation.layer] = node
    if not names:
        raise missing("no node has a role", "AssignRoles")


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _check_quantized(graph_module: fx.GraphModule) -> None:
    """Every node with bits calls a module that computes in them, unless an integer kernel has taken its place."""
    if LOWERED in facts_of(graph_module):
        return  # `lowered` says of each of these nodes what runs it; another runtime has taken them all
    nodes = [node for node in nodes_with_role(graph_module) if annotation_of(node).has_bits]
    if not nodes:
        raise missing("no node has bits", "AllocateBits and SubstituteQuantizers")
    for node in nodes:
        annotation = annotation_of(node)
        module = module_of(graph_module, node)
        if not isinstance(module, ComputesInBits):
            raise broken_at(node, "it has bits and computes in float", "run SubstituteQuantizers again")
        weight, inputs = module.operand_bits()
        if (weight, inputs) != (annotation.weight_bits, annotation.input_bits):
            problem = f"its module computes with a weight of {weight} bits and inputs of {inputs}"
            raise broken_at(node, problem, "run SubstituteQuantizers again")


def _check_lowered(graph_module: fx.GraphModule) -> None:
    """Something says of every node with bits how it runs."""
    execution = EXECUTION.get(graph_module)
    if execution is None:
        raise missing("nothing says what runs as integers", "Lower")
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        if annotation.has_bits and annotation.layer not in execution:
            raise broken_at(node, "nothing says which kernel runs it", "run Lower again")


TRACED = Fact("traced", _check_traced)
"""The graph computes what the model computes, and every node that holds a tensor has its shape. By `trace`."""

ROLES_ASSIGNED = Fact("roles assigned", _check_roles)
"""Every layer has a role and a public name of its own. By AssignRoles; files keep it."""

QUANTIZED = Fact("quantized", _check_quantized)
"""Nodes with bits call modules that compute in these bits. By SubstituteQuantizers; files keep it."""

LOWERED = Fact("lowered", _check_lowered, rests_on=frozenset({QUANTIZED}))
"""Something says of every node with bits what runs it. By Lower."""
