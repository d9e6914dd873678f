from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.fx import GraphModule

from allocators.greedy import Greedy
from allocators.problem.budget import Budget
from fxquant.errors import (
    BudgetError,
    CalibrationError,
    InfeasibleBudgetError,
    OverrideError,
    PatternError,
    PipelineError,
)
from fxquant.graph.annotation import Role, annotate_operands, annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import ROLES_ASSIGNED, Fact, facts_of
from fxquant.graph.printer import format_graph
from passes.allocate.allocate_bits import AllocateBits
from passes.pipeline.contract import Pass, PassContext
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes import RECIPES, best, mptq_vit, naive_min_max, recipe
from passes.search.calibrate import Calibrate
from passes.search.insert_observers import OBSERVED, InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import BITS_ALLOCATED, SubstituteQuantizers
from tests.models import images, vit


@dataclass(frozen=True)
class KeepHigh:
    """A user's own pass, as docs/how_to/writing_a_pass.md shows it: pin every node of one role to a width."""

    role: Role
    bits: int = 8

    requires: ClassVar[frozenset[Fact]] = frozenset({BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        nodes = nodes_with_role(graph_module, self.role)
        for node in nodes:
            _, x = annotation_of(node).operands
            annotate_operands(node, bits=(self.bits, x.bits), pinned=(True, x.pinned))
        context.note(role=str(self.role))
        return len(nodes)


def kinds(pipeline: Pipeline) -> list[str]:
    return [type(step).__name__ for step in pipeline]


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    return trace(vit(depth=1), images(2))


@pytest.mark.quick
class TestBuilding:
    def test_a_misplaced_pass_is_named_with_what_it_lacks(self) -> None:
        with pytest.raises(PipelineError) as caught:
            Pipeline([AssignRoles(), KeepHigh(Role.SOFTMAX)])
        assert str(caught.value) == (
            f"pass 1 {KeepHigh(Role.SOFTMAX)!r} requires 'bits allocated', which no earlier pass provides; "
            f"known there: 'roles assigned', 'traced'"
        )

    def test_facts_that_a_pass_breaks_are_gone(self) -> None:
        observed = (AssignRoles(), PlanOperands(), InsertObservers())
        with pytest.raises(PipelineError, match=r"pass 6 .*requires 'calibrated'"):
            Pipeline([*observed, Calibrate(), SearchScales(), AssignRoles(), SearchScales()])

    def test_nothing_assumed(self) -> None:
        with pytest.raises(PipelineError, match="known there: nothing"):
            Pipeline([AssignRoles()], assumes=())

    def test_passes_are_passes(self) -> None:
        assert all(isinstance(step, Pass) for step in mptq_vit(4))
        assert isinstance(KeepHigh(Role.QKV), Pass)

    def test_equal_options_make_equal_pipelines(self) -> None:
        assert mptq_vit("W4A4") == mptq_vit("W4A4")
        assert mptq_vit("W4A4") != mptq_vit("W4A5")


@pytest.mark.quick
class TestEditing:
    def test_recipe(self) -> None:
        assert kinds(mptq_vit(4)) == [
            "AssignRoles", "PlanOperands", "CheckBudget", "FoldSqb", "InsertObservers", "Calibrate", "SearchScales",
            "AllocateBits", "SubstituteQuantizers",
        ]  # fmt: skip
        assert len(mptq_vit(4)) == 9

    def test_changed(self) -> None:
        pipeline = mptq_vit(4)
        changed = pipeline.changed(AllocateBits, narrowest=3).changed(FoldSqb, strength=0.8)
        before, after = pipeline[pipeline.position(AllocateBits)], changed[changed.position(AllocateBits)]
        assert isinstance(before, AllocateBits)
        assert after == dataclasses.replace(before, narrowest=3)
        assert FoldSqb(strength=0.8) in list(changed)
        assert kinds(changed) == kinds(pipeline)
        with pytest.raises(PipelineError, match=r"AllocateBits has no option 'width'; it has budget"):
            pipeline.changed(AllocateBits, width=3)

    @pytest.mark.parametrize(
        ("budget", "full", "narrowest"), [("W3A3", False, 3), ("W3A3", True, 2), ("W4A4", True, 3), ("6MB", True, 3)]
    )
    def test_best_has_two_bits_where_nothing_else_pays(self, budget: str, full: bool, narrowest: int) -> None:
        pipeline = best(budget, fully_quantized=full)
        step = pipeline[pipeline.position(AllocateBits)]
        assert isinstance(step, AllocateBits)
        assert step.narrowest == narrowest

    def test_what_is_no_pass(self) -> None:
        with pytest.raises(PipelineError, match=r"write FoldSqb\(\)"):
            Pipeline([AssignRoles(), FoldSqb])  # type: ignore[list-item]
        with pytest.raises(PipelineError, match="3 is no pass"):
            Pipeline([3])  # type: ignore[list-item]
        with pytest.raises(PipelineError, match="named by its class, FoldSqb"):
            mptq_vit(4).without(FoldSqb())  # type: ignore[arg-type]

    def test_options_of_the_allocation(self) -> None:
        assert AllocateBits("W2").budget == Budget.parse("W2")  # type: ignore[arg-type]
        with pytest.raises(BudgetError, match="allocator must be an Allocator"):
            mptq_vit(4, allocator="greedy")  # type: ignore[arg-type]
        with pytest.raises(BudgetError, match="from 2 to 8, not 99"):
            mptq_vit(4, first_last_bits=99)
        with pytest.raises(OverrideError, match="overrides must be a mapping"):
            mptq_vit(4, overrides=["qkv"])  # type: ignore[arg-type]
        with pytest.raises(CalibrationError, match="'hessian' or 'mse' or 'min-max', found 'foo'"):
            SearchScales(criterion="foo")  # type: ignore[arg-type]

    def test_contexts_of_no_use(self, graph: GraphModule) -> None:
        with pytest.raises(CalibrationError, match="whole"):
            PassContext(batch_size=2.5)  # type: ignore[arg-type]
        with pytest.raises(CalibrationError, match="context has 0"):
            Pipeline([AssignRoles(), FoldSqb()]).run(graph, PassContext(images(0)))
        with pytest.raises(CalibrationError, match="trace again"):
            Pipeline([AssignRoles(), FoldSqb()]).run(graph, PassContext(images(2, 48)))
        with pytest.raises(CalibrationError, match="NaN"):
            Pipeline([AssignRoles(), FoldSqb()]).run(graph, PassContext(images(2) / 0))
        with pytest.raises(
            CalibrationError, match=r"are torch.float64, and the graph takes torch.float32: .*images\.to"
        ):
            Pipeline([AssignRoles(), FoldSqb()]).run(graph, PassContext(images(2).double()))

    def test_before_after_replace_without(self) -> None:
        pipeline = mptq_vit(4)
        keep = KeepHigh(Role.HEAD)
        assert kinds(pipeline.after(AllocateBits, keep))[-2:] == ["KeepHigh", "SubstituteQuantizers"]
        assert pipeline.before(SubstituteQuantizers, keep) == pipeline.after(AllocateBits, keep)
        assert "FoldSqb" not in kinds(pipeline.without(FoldSqb))
        replaced = pipeline.replace(FoldSqb, FoldSqb(mu="none"))
        assert list(replaced)[3] == FoldSqb(mu="none")
        assert len(pipeline) == 9, "a pipeline is not changed"

    def test_edits_are_checked(self) -> None:
        with pytest.raises(PipelineError, match="requires 'bits allocated'"):
            mptq_vit(4).before(AllocateBits, KeepHigh(Role.HEAD))
        with pytest.raises(PipelineError, match="requires 'calibrated'"):
            mptq_vit(4).without(Calibrate)
        for edit in (
            lambda p: p.without(KeepHigh),
            lambda p: p.replace(KeepHigh, FoldSqb()),
            lambda p: p.after(KeepHigh),
        ):
            with pytest.raises(PipelineError, match=r"no KeepHigh in this pipeline: \['AssignRoles'"):
                edit(mptq_vit(4))

    def test_unpacking_and_slices(self) -> None:
        pipeline = mptq_vit(4)
        assert Pipeline([*pipeline]) == pipeline
        head, tail = pipeline[:5], pipeline[5:]
        assert kinds(head) + kinds(tail) == kinds(pipeline)
        assert tail.assumes == head.provides
        assert OBSERVED in tail.assumes
        assert kinds(pipeline[-1:]) == ["SubstituteQuantizers"]
        assert isinstance(pipeline[0], AssignRoles)
        assert isinstance(pipeline[-1], SubstituteQuantizers)


class TestRunning:
    def test_the_graph_given_is_untouched(self, graph: GraphModule) -> None:
        text, state, meta = format_graph(graph), copy.deepcopy(graph.state_dict()), dict(graph.meta)
        annotations = [annotation_of(node) for node in graph.graph.nodes]
        mptq_vit("W4A4", bits=(3, 4, 5)).run(graph, PassContext(images()))
        assert format_graph(graph) == text
        assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
        assert set(graph.state_dict()) == set(state)
        assert graph.meta == meta
        assert [annotation_of(node) for node in graph.graph.nodes] == annotations

    def test_same_seed_same_codes(self, graph: GraphModule) -> None:
        states = []
        for seed in (3, 3, 4):
            pipeline = mptq_vit("W4A4", bits=(3, 4, 5))
            states.append(pipeline.run(graph, PassContext(images(), seed=seed)).state_dict())
        assert set(states[0]) == set(states[1])
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])

    def test_in_two_halves_as_in_one(self, graph: GraphModule) -> None:
        pipeline = mptq_vit("W4A4", bits=(3, 4, 5))
        context = PassContext(images())
        whole = pipeline.run(graph, context)
        halves = pipeline[5:].run(pipeline[:5].run(graph, context), context)
        x = images(2, seed=5)
        assert torch.equal(whole(x), halves(x))

    def test_a_graph_that_lacks_what_is_assumed(self, graph: GraphModule) -> None:
        with pytest.raises(PipelineError, match="the graph given lacks 'bits allocated', "):
            mptq_vit(4)[-1:].run(graph, PassContext())

    def test_a_users_own_pass(self, graph: GraphModule) -> None:
        pipeline = mptq_vit("W4A4", bits=(3, 4, 8)).after(AllocateBits, KeepHigh(Role.FC1))
        context = PassContext(images())
        quantized = pipeline.run(graph, context)
        assert "%blocks_0_mlp_fc1 = fc1[w8a" in format_graph(quantized)
        assert quantized.get_submodule("blocks.0.mlp.fc1").weight_quantizer.bits == 8
        entry = context.journal.entries[8]
        assert entry.step == repr(KeepHigh(Role.FC1))
        assert (entry.nodes_changed, entry.notes) == (1, {"role": "fc1"})
        assert entry.seconds >= 0
        assert entry.peak_mib > 1

    def test_the_journal_has_one_entry_per_pass(self, graph: GraphModule) -> None:
        context = PassContext(images())
        naive_min_max("W4A4", bits=(4, 8)).run(graph, context)
        assert [entry.step.split("(")[0] for entry in context.journal.entries] == kinds(naive_min_max("W4A4"))
        assert {"status", "solver", "usage"} <= set(context.journal.entries[6].notes)


class TestBeforeAnyImage:
    """CheckBudget fails in a context without images: nothing before it can have used any."""

    def test_budget(self, graph: GraphModule) -> None:
        with pytest.raises(InfeasibleBudgetError, match="minimum reachable"):
            mptq_vit("W1.5A4").run(graph, PassContext())

    def test_override(self, graph: GraphModule) -> None:
        with pytest.raises(OverrideError, match="nowhere"):
            mptq_vit("W4A4", overrides={"nowhere": 4}).run(graph, PassContext())

    def test_image_bits_among_the_candidates(self, graph: GraphModule) -> None:
        pipeline = mptq_vit("W4A4", bits=(3, 4, 5))
        (allocate,) = [step for step in pipeline if isinstance(step, AllocateBits)]
        assert allocate.image_bits == 5
        wrong = AllocateBits(Budget.parse("W4A4"), Greedy(), image_bits=8)
        with pytest.raises(OverrideError, match=r"image_bits=8 is not among the candidate bits \(3, 4, 5\)"):
            pipeline.replace(AllocateBits, wrong).run(graph, PassContext())


def test_a_slice_without_the_allocation_checks_nothing(graph: GraphModule) -> None:
    context = PassContext()
    pipeline = naive_min_max("W1.5A4")[:3]
    pipeline.run(graph, context)
    assert [entry.step for entry in context.journal.entries] == [repr(step) for step in pipeline]


@pytest.mark.parametrize(("budget", "least"), [("W3A3", 3), ("W2.5A3", 2), ("W3A2.5", 2)])
def test_narrow_widths_only_where_the_budget_needs_them(graph: GraphModule, budget: str, least: int) -> None:
    pipeline = mptq_vit(budget, bits=(2, 3, 4))
    allocate = AllocateBits(Budget.parse(budget), image_bits=4, narrowest=3)
    allocated = pipeline.replace(AllocateBits, allocate).run(graph, PassContext(images(2)))
    found = [annotation_of(node) for node in nodes_with_role(allocated)]
    widths = [bits for a in found for bits in a.bits if bits is not None]
    assert min(widths) == least


def test_best_has_three_bits_at_least() -> None:
    for name in ("best", "best_thorough"):
        allocate = next(step for step in recipe(name)("W3A3") if isinstance(step, AllocateBits))
        assert allocate.narrowest == 3


def test_recipes_by_name() -> None:
    assert recipe("mptq_vit") is mptq_vit
    for name in RECIPES:
        assert isinstance(recipe(name)("W4A4"), Pipeline)
        assert isinstance(recipe(name)("W4A4", fully_quantized=True), Pipeline)
    with pytest.raises(PipelineError, match="no recipe is called 'nope'; there are best"):
        recipe("nope")


def test_recipes_refuse_unknown_families_when_built() -> None:
    with pytest.raises(PatternError):
        mptq_vit(4).replace(PlanOperands, PlanOperands(other="nope"))


@pytest.mark.parametrize("together", [1, 2, 4])
def test_images_are_gathered_in_order_a_few_at_a_time_whatever_the_batch_size(
    graph: GraphModule, together: int
) -> None:
    class Nothing:
        def state(self) -> dict[str, torch.Tensor]:
            return {}

        def restore(self, state: dict[str, torch.Tensor]) -> None:
            assert not state, "nothing was kept"

        def merge(self, state: dict[str, torch.Tensor]) -> None:
            raise AssertionError("nothing was gathered")

    for batch_size in (1, 8):
        context = PassContext(images(5), batch_size=batch_size)
        found = list(context.gather("looking", Nothing(), graph, together=together))
        assert [first for first, _ in found] == list(range(0, 5, together))
        assert torch.equal(torch.cat([batch for _, batch in found]), context.images)


def test_a_copy_is_changed_or_in_place_the_graph_itself() -> None:
    graph_module = trace(vit(depth=1), images(2))
    pipeline = Pipeline([AssignRoles()])
    copied = pipeline.run(graph_module, PassContext())
    assert copied is not graph_module
    assert ROLES_ASSIGNED not in facts_of(graph_module)
    assert pipeline.run(graph_module, PassContext(), in_place=True) is graph_module
    assert ROLES_ASSIGNED in facts_of(graph_module)
