"""Proofs: what a pass changes is found, named and refused; what it is meant to change is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import fxquant
from fxquant.errors import BackendError, FxQuantError, PipelineError, VerificationError
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import QUANTIZED, TRACED, Fact
from passes.allocate.allocate_bits import AllocateBits
from passes.lower.lower import Lower
from passes.pipeline.contract import Effect, PassContext
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.prepare.fold_sqb import FoldSqb
from passes.prepare.rotate_residual import RotateResidual
from passes.recipes import best, mptq_vit
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.substitute.substitute_quantizers import SubstituteQuantizers
from tests.models import images, vit


@dataclass(frozen=True)
class Scale:
    """Multiplies one layer's weight; says nothing of its effect."""

    layer: str = "blocks.0.mlp.fc2"
    factor: float = 1.01

    requires: ClassVar[frozenset[Fact]] = frozenset({TRACED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        weight = graph_module.get_submodule(self.layer).weight
        with torch.no_grad():
            weight.data.mul_(self.factor)
        return 1


class ScaleExactly(Scale):
    effect: ClassVar[Effect] = Effect.EXACT


class ScaleWeights(Scale):
    effect: ClassVar[Effect] = Effect.WEIGHTS


class ScaleOnPurpose(Scale):
    effect: ClassVar[Effect] = Effect.FUNCTION


class DropBias(Scale):
    """Leaves out what no float weight brings back, in a pass that claims to change weights only."""

    effect: ClassVar[Effect] = Effect.WEIGHTS

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        graph_module.get_submodule(self.layer).bias = None
        return 1


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return vit(depth=1)


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> GraphModule:
    return trace(model, images(2))


def quick(*before: Any, after: tuple[Any, ...] = ()) -> Pipeline:
    """A pipeline to quantized layers, with passes before its folds and after its allocation."""
    pipeline = mptq_vit("W4A4", bits=(3, 4, 8)).after(AllocateBits, *after) if after else mptq_vit("W4A4", bits=(3, 4))
    return pipeline.before(FoldSqb, *before) if before else pipeline


def test_an_exact_pass_that_is_not_is_named_with_the_node_that_moved(graph: GraphModule) -> None:
    pipeline = Pipeline([AssignRoles(), RotateResidual(), ScaleExactly()])
    with pytest.raises(VerificationError) as caught:
        pipeline.run(graph, PassContext(images(1)))
    message = str(caught.value)
    assert message.startswith("ScaleExactly(layer='blocks.0.mlp.fc2', factor=1.01) declares Effect.EXACT")
    assert "the first node whose value moved is `%blocks_0_mlp_fc2 = fc2(" in message
    assert "differ by" in message
    assert "is allowed" in message
    assert "RotateResidual" not in message


def test_a_pass_that_says_nothing_is_found_before_the_next_exact_one_and_at_the_end(graph: GraphModule) -> None:
    with pytest.raises(VerificationError, match=r"one of these passes did it: .*Scale\(layer"):
        Pipeline([AssignRoles(), PlanOperands(), InsertObservers(), Scale()]).run(graph, PassContext(images(2)))
    steps = [AssignRoles(), PlanOperands(), FoldSqb(), Scale(), InsertObservers()]
    with pytest.raises(VerificationError, match=r"before InsertObservers.*one of these passes did it: .*Scale\("):
        Pipeline(steps).run(graph, PassContext(images(2)))


def test_what_is_meant_is_allowed(graph: GraphModule) -> None:
    context = PassContext(images(2))
    Pipeline([AssignRoles(), PlanOperands(), FoldSqb(), ScaleOnPurpose(), InsertObservers()]).run(graph, context)
    noted = [entry.step.partition("(")[0] for entry in context.journal.entries if "proof" in entry.notes]
    assert noted == ["FoldSqb", "InsertObservers"]
    with pytest.raises(PipelineError, match=r"write Effect\.EXACT"):
        Pipeline([_with_effect("exact")]).run(graph, context)


def _with_effect(effect: object) -> Scale:
    step = Scale()
    object.__setattr__(step, "effect", effect)
    return step


def test_without_images_a_seed_makes_them(graph: GraphModule) -> None:
    with pytest.raises(VerificationError, match="ScaleExactly"):
        Pipeline([ScaleExactly()]).run(graph, PassContext())


def test_the_end_of_compile_is_held_against_the_callers_model(model: nn.Module) -> None:
    """Weights that a pass replaces are put back for it; a bias that it drops is not there any more."""
    quantized = fxquant.compile(model, None, calibration=images(2), recipe=quick(after=(ScaleWeights(),)))
    proof = quantized.journal.entries[-1].notes["proof"]
    assert 0 <= proof["difference"] <= proof["tolerance"]
    assert proof["cpu_ms"] >= 0
    with pytest.raises(VerificationError) as caught:
        fxquant.compile(model, None, calibration=images(2), recipe=quick(after=(DropBias(),)))
    assert "its quantizers bypassed and its float weights restored, does not compute the model it was made from" in str(
        caught.value
    )
    assert "DropBias" in str(caught.value)
    assert "`%blocks_0_mlp_fc2 = fc2[w" in str(caught.value)


def test_a_graph_that_is_not_the_callers_model_is_refused_before_calibration(graph: GraphModule) -> None:
    context = PassContext(images(2), expected=graph(images(2)) + 0.1)
    with pytest.raises(VerificationError, match=r"before FoldSqb.*does not compute the model it was made from"):
        quick().run(graph, context)
    assert [entry.step for entry in context.journal.entries] == [repr(step) for step in quick()[:3]]


def test_what_hangs_on_the_callers_model_is_computed_or_refused() -> None:
    """A hook on a layer and a replaced forward: nothing of them may be dropped in silence."""
    for replace in (_hooked, _patched):
        model = replace(vit(depth=1))
        try:
            quantized = fxquant.compile(model, None, calibration=images(2), recipe=mptq_vit("W8A8", bits=(8,)))
        except FxQuantError:
            continue
        with torch.no_grad():
            wanted, found = model(images(4)), quantized(images(4))
        assert float((found - wanted).square().mean() / wanted.square().mean()) < 0.02


def _hooked(model: nn.Module) -> nn.Module:
    model.get_submodule("blocks.0.mlp.fc1").register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def _patched(model: nn.Module) -> nn.Module:
    layer: Any = model.get_submodule("blocks.0.attn.proj")
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 2
    return model


class BrokenLower(Lower):
    """A lowering that gets one layer wrong."""

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        layer = graph_module.get_submodule("blocks.0.mlp.fc2")
        layer.bias = layer.bias + torch.linspace(-3, 3, len(layer.bias))
        return super().apply(graph_module, context)


@pytest.fixture(scope="module")
def quantized(model: nn.Module) -> fxquant.Compiled:
    return fxquant.compile(model, None, calibration=images(2), recipe=best("W4A4", bits=(3, 4, 8)))


@pytest.mark.parametrize("chains", [True, False])
def test_a_wrong_lowering_is_refused_by_the_layer_that_differs(quantized: fxquant.Compiled, chains: bool) -> None:
    pipeline = Pipeline([BrokenLower(chains=chains)], assumes=[QUANTIZED])
    for answers in (None, quantized.answers):
        with pytest.raises(BackendError, match=r"first layer that differs is 'blocks\.0\.mlp\.fc2'.*load\(path\)"):
            pipeline.run(quantized.graph_module, PassContext(answers=answers))


def test_a_right_lowering_says_how_far_it_is(quantized: fxquant.Compiled) -> None:
    notes = quantized.lowered("auto").journal.entries[-1].notes
    assert notes["proof"]["difference"] <= notes["proof"]["tolerance"] / 10
    graph_module = quantized.graph_module
    Pipeline([Lower("simulated")], assumes=[QUANTIZED]).run(graph_module, PassContext())


def test_a_pipeline_that_goes_on_to_integers(model: nn.Module) -> None:
    pipeline = Pipeline([*quick(), Lower(chains=False)])
    context = PassContext(images(2))
    lowered = pipeline.run(trace(model, images(2)), context)
    assert [("proof" in entry.notes) for entry in context.journal.entries][-2:] == [False, True]
    assert lowered(images(2)).shape == (2, 7)
    assert isinstance(pipeline[-2], SubstituteQuantizers)
