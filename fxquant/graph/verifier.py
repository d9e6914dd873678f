"""What each fact means, as a check that names the first node that breaks it.

Passes declare facts; `verify` tests one. A check reads the graph, its annotations and its meta, and runs nothing. No
check believes a declaration: each looks for what the pass that provides the fact leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import fx, nn

from fxquant.errors import VerificationError
from fxquant.graph.annotation import (
    EXECUTION,
    LATENCY,
    Annotation,
    Fact,
    Role,
    annotation_of,
    facts_of,
    folds_of,
    nodes_with_role,
)
from fxquant.graph.printer import describe

_SHAPED = frozenset({"placeholder", "call_module", "get_attr"})


@runtime_checkable
class Observes(Protocol):
    """What a check reads of an observer; the observers themselves are in `fxquant.quantizers`.

    family: None where the edge stays float. images: how many images it has seen. keeps_gram: whether it gathers the
    Gram matrix of its values, which is then in gram.
    """

    family: str | None
    images: int
    keeps_gram: bool
    gram: object | None


@runtime_checkable
class ComputesInBits(Protocol):
    """What a check reads of a quantized module; the modules themselves are in `fxquant.runtime.simulated`."""

    def operand_bits(self) -> tuple[int | None, tuple[int | None, ...]]:
        """Width of the weight, and of every input; None where one stays float or is not there."""


def verify(graph_module: fx.GraphModule, fact: Fact) -> None:
    """Check that a fact holds.

    Raises VerificationError naming the fact, the node that breaks it, and the pass to run.
    """
    if fact not in facts_of(graph_module):
        raise VerificationError(f"'{fact}' is not declared: run the pass that provides it first")
    CHECKERS[fact](graph_module)


def _fail(fact: Fact, node: fx.Node, problem: str, remedy: str) -> VerificationError:
    return VerificationError(f"'{fact}' does not hold at `{describe(node)}`: {problem}; {remedy}")


def _check_traced(graph_module: fx.GraphModule) -> None:
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"'{Fact.TRACED}' does not hold: {error}; fix the pass that ran last") from error
    for node in graph_module.graph.nodes:
        if node.op in _SHAPED and "tensor_meta" not in node.meta:
            raise _fail(Fact.TRACED, node, "it has no tensor_meta", "a pass that adds nodes writes their shapes")
        if not node.users and not node.is_impure():
            raise _fail(Fact.TRACED, node, "nothing uses it", "erase nodes that a pass leaves without users")


def _check_roles(graph_module: fx.GraphModule) -> None:
    names: dict[str, fx.Node] = {}
    for node in graph_module.graph.nodes:
        annotation = annotation_of(node)
        if annotation.role is None:
            if node.op == "call_module" and _is_layer(graph_module.get_submodule(str(node.target))):
                raise _fail(Fact.ROLES_ASSIGNED, node, "a layer without a role", "run AssignRoles again")
            continue
        if annotation.layer in names:
            other = describe(names[annotation.layer])
            raise _fail(Fact.ROLES_ASSIGNED, node, f"`{other}` has its name, '{annotation.layer}'", "rename one")
        if not annotation.layer:
            raise _fail(Fact.ROLES_ASSIGNED, node, "it has no public name", "run AssignRoles again")
        names[annotation.layer] = node


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _observers(graph_module: fx.GraphModule) -> list[tuple[fx.Node, Observes]]:
    """Nodes that call an observer, with it."""
    modules = {n: graph_module.get_submodule(str(n.target)) for n in graph_module.graph.nodes if n.op == "call_module"}
    return [(node, module) for node, module in modules.items() if isinstance(module, Observes)]


def _check_observed(graph_module: fx.GraphModule) -> None:
    """Observers are there, each on the input of a node that has a role."""
    found = _observers(graph_module)
    if not found:
        raise _absent(Fact.OBSERVED, "no edge has an observer", "InsertObservers")
    for node, _ in found:
        if not any(annotation_of(user).role for user in node.users):
            raise _fail(Fact.OBSERVED, node, "no node with a role reads this observer", "run InsertObservers again")


def _check_calibrated(graph_module: fx.GraphModule) -> None:
    """Every observer has seen images."""
    found = _observers(graph_module)
    if not found:
        raise _absent(Fact.CALIBRATED, "no edge has an observer", "InsertObservers and Calibrate")
    for node, observer in found:
        if not observer.images:
            raise _fail(Fact.CALIBRATED, node, "this observer has seen no image", "run Calibrate again")


def _check_grams(graph_module: fx.GraphModule) -> None:
    """Wherever a weight is one matrix, the observer of its input has that input's Gram matrix."""
    found = [(node, observer) for node, observer in _observers(graph_module) if observer.keeps_gram]
    if not any(observer.gram is not None for _, observer in found):
        raise _absent(Fact.GRAMS_KNOWN, "no observer has a Gram matrix", "Calibrate")
    for node, observer in found:
        linear = [u for u in node.users if u.op == "call_module" and _is_linear(graph_module, u)]
        if observer.gram is None and linear:
            raise _fail(Fact.GRAMS_KNOWN, linear[0], "its input's Gram matrix is not there", "run Calibrate again")


def _is_linear(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(graph_module.get_submodule(str(node.target)), nn.Linear)


def _check_folded(graph_module: fx.GraphModule) -> None:
    """A pass that folds has run, and parameters have stayed finite through it."""
    if not folds_of(graph_module):
        raise _absent(Fact.FOLDED, "no pass has folded anything", "FoldSqb, RotateResidual or BalanceHeads")
    for node in nodes_with_role(graph_module):
        if node.op != "call_module":
            continue
        for name, parameter in graph_module.get_submodule(str(node.target)).named_parameters():
            if not torch.isfinite(parameter).all():
                raise _fail(Fact.FOLDED, node, f"'{name}' is not finite", "calibrate on images with finite outputs")


def _absent(fact: Fact, problem: str, passes: str) -> VerificationError:
    return VerificationError(f"'{fact}' does not hold: {problem}; run {passes} first")


def _check_scales(graph_module: fx.GraphModule) -> None:
    if not any(annotation_of(node).weight_candidates for node in nodes_with_role(graph_module)):
        raise VerificationError(f"'{Fact.SCALES_SEARCHED}' does not hold: no weight has candidates; run SearchScales")
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        searched = annotation.weight_candidates or annotation.activation_candidates
        if _has_weight(annotation.role) and searched and not annotation.weight_candidates:
            raise _fail(Fact.SCALES_SEARCHED, node, "its weight has no candidates", "run SearchScales again")
        for candidates in (annotation.weight_candidates, *annotation.activation_candidates):
            bits = [candidate.bits for candidate in candidates]
            if bits != sorted(set(bits)):
                raise _fail(Fact.SCALES_SEARCHED, node, f"candidates of {bits} bits", "list each width once, ascending")


def _check_scores(graph_module: fx.GraphModule) -> None:
    """Some layer has scores, and every layer that has some has one per candidate."""
    annotations = [annotation_of(node) for node in nodes_with_role(graph_module)]
    if not any(found.weight_sensitivity or found.activation_sensitivity for found in annotations):
        raise _absent(Fact.SCORED, "no layer has scores", "ScoreLayers")
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        groups = [(annotation.weight_sensitivity, annotation.weight_candidates)]
        groups += [(annotation.activation_sensitivity, group) for group in annotation.activation_candidates]
        for scores, candidates in groups:
            if scores and len(scores) != len(candidates):
                problem = f"{len(scores)} scores for {len(candidates)} candidates"
                raise _fail(Fact.SCORED, node, problem, "run ScoreLayers after SearchScales")


def _check_latency(graph_module: fx.GraphModule) -> None:
    """Times of layers are in the graph's meta."""
    measured = graph_module.meta.get(LATENCY)
    if not isinstance(measured, dict) or not measured.get("layers"):
        raise _absent(Fact.LATENCY_KNOWN, "no times have been measured", "MeasureLatency")


def _check_bits(graph_module: fx.GraphModule) -> None:
    """Some node has bits, and each of its widths is one that it has a quantizer for."""
    nodes = nodes_with_role(graph_module)
    if not any(annotation_of(node).has_bits for node in nodes):
        raise _absent(Fact.BITS_ALLOCATED, "no node has bits", "AllocateBits")
    substituted = Fact.QUANTIZED in facts_of(graph_module)
    for node in nodes:
        annotation = annotation_of(node)
        candidates = (annotation.weight_candidates, *annotation.activation_candidates)
        if substituted and not any(candidates):
            continue  # read from a file, which has the chosen quantizers only
        for kind, bits, widths in _widths(annotation):
            if bits not in widths and (bits is not None or widths):
                listed = f"among {widths}" if widths else "there: this operand has no candidates"
                problem = f"{bits} {kind} bits are not {listed}"
                raise _fail(Fact.BITS_ALLOCATED, node, problem, "allocate among the candidates, or search that width")


def _widths(annotation: Annotation) -> list[tuple[str, int | None, list[int]]]:
    """What is multiplied, its bits, and the widths that it has candidates of."""
    found = [("weight", annotation.weight_bits, annotation.weight_candidates)]
    inputs = zip(annotation.input_bits, annotation.activation_candidates, strict=True)
    found += [("activation", bits, group) for bits, group in inputs]
    if not annotation.activation_candidates:
        found.append(("activation", annotation.activation_bits, ()))
    return [(kind, bits, [candidate.bits for candidate in candidates]) for kind, bits, candidates in found]


def _check_quantized(graph_module: fx.GraphModule) -> None:
    """Every node with bits calls a module that computes in them, unless an integer kernel has taken its place."""
    if Fact.LOWERED in facts_of(graph_module):
        return  # `lowered` says of each of these nodes what runs it; another runtime has taken them all
    nodes = [node for node in nodes_with_role(graph_module) if annotation_of(node).has_bits]
    if not nodes:
        raise _absent(Fact.QUANTIZED, "no node has bits", "AllocateBits and SubstituteQuantizers")
    for node in nodes:
        annotation = annotation_of(node)
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, ComputesInBits):
            raise _fail(Fact.QUANTIZED, node, "it has bits and computes in float", "run SubstituteQuantizers again")
        weight, inputs = module.operand_bits()
        widths = {bits for bits in (annotation.activation_bits, annotation.left_bits) if bits is not None}
        found = {bits for bits in inputs if bits is not None}
        if weight != annotation.weight_bits or found != widths:
            problem = f"its module computes with a weight of {weight} bits and inputs of {sorted(found)}"
            raise _fail(Fact.QUANTIZED, node, problem, "run SubstituteQuantizers again")


def _check_lowered(graph_module: fx.GraphModule) -> None:
    """Something says of every node with bits how it runs."""
    if EXECUTION not in graph_module.meta:
        raise _absent(Fact.LOWERED, "nothing says what runs as integers", "Lower")
    execution = graph_module.meta[EXECUTION]
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        if annotation.has_bits and annotation.layer not in execution:
            raise _fail(Fact.LOWERED, node, "nothing says which kernel runs it", "run Lower again")


def _has_weight(role: Role | None) -> bool:
    return role is not None and role.has_weight


CHECKERS: dict[Fact, Callable[[fx.GraphModule], None]] = {
    Fact.TRACED: _check_traced,
    Fact.ROLES_ASSIGNED: _check_roles,
    Fact.FOLDED: _check_folded,
    Fact.OBSERVED: _check_observed,
    Fact.CALIBRATED: _check_calibrated,
    Fact.GRAMS_KNOWN: _check_grams,
    Fact.SCALES_SEARCHED: _check_scales,
    Fact.SCORED: _check_scores,
    Fact.LATENCY_KNOWN: _check_latency,
    Fact.BITS_ALLOCATED: _check_bits,
    Fact.QUANTIZED: _check_quantized,
    Fact.LOWERED: _check_lowered,
}
