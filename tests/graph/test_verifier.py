"""Facts: every check looks at the graph, and none believes a declaration."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch.fx import GraphModule

from fxquant.errors import VerificationError
from fxquant.graph.annotation import Fact, Role, annotate, annotation_of, declare, facts_of, nodes_with_role
from fxquant.graph.verifier import verify
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.measure_latency import MeasureLatency
from passes.lower.lower import Lower
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import best, mptq_vit
from passes.substitute.substitute_quantizers import SubstituteQuantizers
from tests.models import images, traced, vit

BEYOND_ROLES = [fact for fact in Fact if fact not in (Fact.TRACED, Fact.ROLES_ASSIGNED)]


@pytest.fixture(scope="module")
def with_roles() -> GraphModule:
    return traced(vit(depth=1), images(2))


@pytest.fixture(scope="module")
def allocated(with_roles: GraphModule) -> GraphModule:
    """With bits, before quantizers are substituted."""
    return mptq_vit("W4A4", bits=(3, 4, 8))[:-1].run(with_roles, PassContext(images(2)))


@pytest.mark.parametrize("fact", BEYOND_ROLES)
def test_a_graph_with_roles_only_has_no_other_fact(with_roles: GraphModule, fact: Fact) -> None:
    graph_module = copy.deepcopy(with_roles)
    declare(graph_module, frozenset({fact}))
    with pytest.raises(VerificationError, match=f"'{fact}' does not hold"):
        verify(graph_module, fact)


def test_what_a_pipeline_declares_holds(with_roles: GraphModule) -> None:
    seen = set[Fact]()
    graph_module, context = with_roles, PassContext(images(2))
    pipeline = best("W4A4", bits=(3, 4, 8)).before(AllocateBits, MeasureLatency())
    for index in range(len(pipeline)):
        graph_module = pipeline[index : index + 1].run(graph_module, context)
        for fact in facts_of(graph_module):
            verify(graph_module, fact)
            seen.add(fact)
    lowered = Pipeline([Lower()], assumes=[Fact.QUANTIZED]).run(graph_module, context)
    for fact in facts_of(lowered):
        verify(lowered, fact)
        seen.add(fact)
    assert seen == set(Fact) - {Fact.SCORED}


@dataclass(frozen=True)
class NineBits:
    """A stranger's pass: more bits for one role than anything was searched for."""

    role: Role = Role.FC1

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        nodes = nodes_with_role(graph_module, self.role)
        for node in nodes:
            annotate(node, weight_bits=9, activation_bits=9)
        return len(nodes)


@pytest.mark.parametrize("role", [Role.FC1, Role.QK, Role.GELU])
def test_a_width_without_a_candidate_raises(allocated: GraphModule, role: Role) -> None:
    raised = Pipeline([NineBits(role)], assumes=[Fact.BITS_ALLOCATED]).run(allocated, PassContext())
    with pytest.raises(VerificationError, match=r"'bits allocated' does not hold at .*: 9 \w+ bits are not"):
        Pipeline([SubstituteQuantizers()], assumes=[Fact.BITS_ALLOCATED]).run(raised, PassContext())
    with pytest.raises(VerificationError, match=r"layer 'blocks.0.* has 9 bits, and .*SearchScales"):
        SubstituteQuantizers().apply(raised, PassContext())


def test_a_required_fact_that_was_undone_is_found_before_the_pass_runs(allocated: GraphModule) -> None:
    """The declaration is still there, the candidates are not."""
    graph_module = copy.deepcopy(allocated)
    for node in nodes_with_role(graph_module):
        annotate(node, weight_bits=None, activation_bits=None)
    with pytest.raises(VerificationError, match="'bits allocated' does not hold"):
        Pipeline([SubstituteQuantizers()], assumes=[Fact.BITS_ALLOCATED]).run(graph_module, PassContext())


def test_a_layer_that_lost_its_quantizers_is_named(allocated: GraphModule) -> None:
    quantized = Pipeline([SubstituteQuantizers()], assumes=[Fact.BITS_ALLOCATED]).run(allocated, PassContext())
    verify(quantized, Fact.QUANTIZED)
    (node,) = nodes_with_role(quantized, Role.FC1)
    quantized.get_submodule(str(node.target)).weight_quantizer = None
    with pytest.raises(VerificationError, match=f"'quantized' does not hold at `%{node.name} = fc1"):
        verify(quantized, Fact.QUANTIZED)
    assert annotation_of(node).weight_bits is not None
