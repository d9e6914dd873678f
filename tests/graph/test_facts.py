"""Facts: every check looks at the graph, and none believes a declaration."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.fx import GraphModule

import passes
from fxquant.errors import VerificationError
from fxquant.graph.annotation import Role, annotate_operands, annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import (
    QUANTIZED,
    ROLES_ASSIGNED,
    TRACED,
    Fact,
    broken_at,
    declare,
    facts_of,
    known_after,
    verify,
)
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.measure_latency import MeasureLatency
from passes.allocate.score_layers import SCORED
from passes.lower.lower import Lower
from passes.pipeline.contract import Effect, PassContext
from passes.pipeline.pipeline import Pipeline
from passes.prepare.fold_sqb import FoldSqb
from passes.prepare.folds import FOLDED
from passes.recipes import best, mptq_vit
from passes.search.calibrate import CALIBRATED
from passes.search.insert_observers import OBSERVED
from passes.search.search_scales import SCALES_SEARCHED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED, SubstituteQuantizers
from tests.models import images, traced, vit


def _declared() -> frozenset[Fact]:
    """Every fact that stands as a constant in a module of passes/ or beside tracing."""
    names = [module.name for module in pkgutil.walk_packages(passes.__path__, "passes.")]
    modules = [importlib.import_module(name) for name in ("fxquant.graph.facts", *names)]
    return frozenset(value for module in modules for value in vars(module).values() if isinstance(value, Fact))


FACTS = _declared()
BEYOND_ROLES = sorted(FACTS - {TRACED, ROLES_ASSIGNED}, key=str)


@pytest.fixture(scope="module")
def with_roles() -> GraphModule:
    return traced(vit(depth=1), images(2))


@pytest.fixture(scope="module")
def allocated(with_roles: GraphModule) -> GraphModule:
    """With bits, before quantizers are substituted."""
    return mptq_vit("W4A4", bits=(3, 4, 8))[:-1].run(with_roles, PassContext(images(2)))


@pytest.mark.parametrize("fact", BEYOND_ROLES, ids=str)
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
    lowered = Pipeline([Lower()], assumes=[QUANTIZED]).run(graph_module, context)
    for fact in facts_of(lowered):
        verify(lowered, fact)
        seen.add(fact)
    assert seen == FACTS - {SCORED}


@dataclass(frozen=True)
class NineBits:
    """A stranger's pass: more bits for one role than anything was searched for."""

    role: Role = Role.FC1

    requires: ClassVar[frozenset[Fact]] = frozenset({BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        nodes = nodes_with_role(graph_module, self.role)
        for node in nodes:
            annotate_operands(node, bits=[9] * len(annotation_of(node).operands))
        return len(nodes)


@pytest.mark.parametrize("role", [Role.FC1, Role.QK, Role.GELU])
def test_a_width_without_a_candidate_raises(allocated: GraphModule, role: Role) -> None:
    raised = Pipeline([NineBits(role)], assumes=[BITS_ALLOCATED]).run(allocated, PassContext())
    message = r"'bits allocated' does not hold: at .*, 9 bits of its \w+ operand are not"
    with pytest.raises(VerificationError, match=message):
        Pipeline([SubstituteQuantizers()], assumes=[BITS_ALLOCATED]).run(raised, PassContext())
    with pytest.raises(VerificationError, match=r"layer 'blocks.0.* has 9 bits, and .*SearchScales"):
        SubstituteQuantizers().apply(raised, PassContext())


def test_a_required_fact_that_was_undone_is_found_before_the_pass_runs(allocated: GraphModule) -> None:
    """The declaration is still there, the candidates are not."""
    graph_module = copy.deepcopy(allocated)
    for node in nodes_with_role(graph_module):
        annotate_operands(node, bits=[None] * len(annotation_of(node).operands))
    with pytest.raises(VerificationError, match="'bits allocated' does not hold"):
        Pipeline([SubstituteQuantizers()], assumes=[BITS_ALLOCATED]).run(graph_module, PassContext())


def test_a_layer_that_lost_its_quantizers_is_named(allocated: GraphModule) -> None:
    quantized = Pipeline([SubstituteQuantizers()], assumes=[BITS_ALLOCATED]).run(allocated, PassContext())
    verify(quantized, QUANTIZED)
    (node,) = nodes_with_role(quantized, Role.FC1)
    quantized.get_submodule(str(node.target)).weight_quantizer = None
    with pytest.raises(VerificationError, match=f"'quantized' does not hold: at `%{node.name} = fc1"):
        verify(quantized, QUANTIZED)
    assert annotation_of(node).weight_bits is not None


def test_a_graph_without_roles_has_them_not() -> None:
    graph_module = trace(vit(depth=1), images(2))
    declare(graph_module, [ROLES_ASSIGNED])
    with pytest.raises(VerificationError, match="'roles assigned' does not hold"):
        verify(graph_module, ROLES_ASSIGNED)


def _check_quiet(graph_module: GraphModule) -> None:
    for node in nodes_with_role(graph_module, Role.GELU):
        raise broken_at(node, "it is a GELU", "run Quieten first")


QUIETENED = Fact("quietened", _check_quiet, rests_on=frozenset({ROLES_ASSIGNED}))


@dataclass(frozen=True)
class Quieten:
    """A stranger's pass with a fact of its own: every GELU is replaced by what it is given, if it does its work."""

    works: bool = True

    requires: ClassVar[frozenset[Fact]] = frozenset({ROLES_ASSIGNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({QUIETENED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    effect: ClassVar[Effect] = Effect.FUNCTION

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        for node in nodes_with_role(graph_module, Role.GELU) if self.works else ():
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph_module.graph.erase_node(node)
        graph_module.recompile()
        return 1


def test_a_fact_of_a_strangers_own_is_one_constant_beside_its_pass(with_roles: GraphModule) -> None:
    quiet = Pipeline([Quieten()], assumes=[TRACED, ROLES_ASSIGNED]).run(with_roles, PassContext())
    assert QUIETENED in facts_of(quiet)
    with pytest.raises(VerificationError, match=r"'quietened' does not hold: at `%.* = gelu.*`, it is a GELU; run"):
        Pipeline([Quieten(works=False)], assumes=[TRACED, ROLES_ASSIGNED]).run(with_roles, PassContext())


def test_what_rests_on_a_fact_falls_when_that_is_provided_anew() -> None:
    scaled = frozenset({TRACED, OBSERVED, SCALES_SEARCHED, BITS_ALLOCATED})
    assert known_after(scaled, [FOLDED], []) == {TRACED, OBSERVED, FOLDED}, "through the calibration, gone meanwhile"
    assert known_after(scaled, [SCALES_SEARCHED], []) == {TRACED, OBSERVED, SCALES_SEARCHED}
    assert known_after(scaled, [], [OBSERVED]) == scaled - {OBSERVED}, "what was made of it stays true"
    pipeline = mptq_vit("W4A4")[:-1]
    again = Pipeline([*pipeline, FoldSqb()], pipeline.assumes)
    assert not again.provides & {CALIBRATED, SCALES_SEARCHED, BITS_ALLOCATED}


def test_facts_of_one_name_and_different_checks_are_two() -> None:
    other = Fact("quietened", lambda graph_module: None)
    assert len({QUIETENED, other}) == 2


def test_facts_survive_a_copy_of_the_graph(allocated: GraphModule) -> None:
    assert facts_of(copy.deepcopy(allocated)) == facts_of(allocated)
    assert torch.equal(allocated(images(1)), copy.deepcopy(allocated)(images(1)))
