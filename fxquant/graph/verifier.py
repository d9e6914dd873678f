"""What each fact means, as a check that names the first node that breaks it.

Passes declare facts; `verify` tests one. A check reads the graph and its annotations and runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from fxquant.errors import VerificationError
from fxquant.graph.annotation import Fact, Role, annotation_of, facts_of, nodes_with_role
from fxquant.graph.printer import describe

_SHAPED = frozenset({"placeholder", "call_module", "get_attr"})


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


def _check_calibrated(graph_module: fx.GraphModule) -> None:
    _require_roles(graph_module, Fact.CALIBRATED)


def _check_grams(graph_module: fx.GraphModule) -> None:
    _require_roles(graph_module, Fact.GRAMS_KNOWN)


def _check_observed(graph_module: fx.GraphModule) -> None:
    _require_roles(graph_module, Fact.OBSERVED)


def _check_folded(graph_module: fx.GraphModule) -> None:
    """Parameters stay finite through folding."""
    for node in nodes_with_role(graph_module):
        if node.op != "call_module":
            continue
        for name, parameter in graph_module.get_submodule(str(node.target)).named_parameters():
            if not torch.isfinite(parameter).all():
                raise _fail(Fact.FOLDED, node, f"'{name}' is not finite", "calibrate on images with finite outputs")


def _require_roles(graph_module: fx.GraphModule, fact: Fact) -> None:
    if not nodes_with_role(graph_module):
        raise VerificationError(f"'{fact}' does not hold: no node has a role; run AssignRoles first")


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
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        groups = [(annotation.weight_sensitivity, annotation.weight_candidates)]
        groups += [(annotation.activation_sensitivity, group) for group in annotation.activation_candidates]
        for scores, candidates in groups:
            if scores and len(scores) != len(candidates):
                problem = f"{len(scores)} scores for {len(candidates)} candidates"
                raise _fail(Fact.SCORED, node, problem, "run ScoreLayers after SearchScales")


def _check_latency(graph_module: fx.GraphModule) -> None:
    _require_roles(graph_module, Fact.LATENCY_KNOWN)


def _check_bits(graph_module: fx.GraphModule) -> None:
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        pairs = [("weight", annotation.weight_bits, annotation.weight_candidates)]
        inputs = zip(annotation.input_bits, annotation.activation_candidates, strict=True)
        pairs += [("activation", bits, group) for bits, group in inputs]
        for kind, bits, candidates in pairs:
            widths = [candidate.bits for candidate in candidates]
            if widths and bits not in widths:
                problem = f"{bits} {kind} bits are not among {widths}"
                raise _fail(Fact.BITS_ALLOCATED, node, problem, "allocate among the candidates, or search that width")


def _check_quantized(graph_module: fx.GraphModule) -> None:
    _require_roles(graph_module, Fact.QUANTIZED)


def _check_lowered(graph_module: fx.GraphModule) -> None:
    """Every node with bits says how it runs."""
    execution = graph_module.meta.get("execution", {})
    for node in nodes_with_role(graph_module):
        annotation = annotation_of(node)
        has_bits = annotation.weight_bits is not None or annotation.activation_bits is not None
        if has_bits and annotation.layer not in execution:
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
