"""Attention is one integer node whichever way the model spells it; where it cannot be, the report says why."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.fx import GraphModule

import fxquant
from allocators.uniform import Uniform
from fxquant.graph.facts import QUANTIZED
from fxquant.graph.notes import execution_of
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.lowered import IntegerAttention, SeparateAttention
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedLinear
from passes.lower.lower import Lower
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import RECIPES
from tests.models import images, scrambled, traced
from tests.passes.lower.spellings import DIRECT, REFUSED, Attend, Model, hugging_face, rotated

pytestmark = pytest.mark.skipif(library.why_absent() is not None, reason=str(library.why_absent()))
SMALL = {"embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 7}


def quantized(model: nn.Module, size: int = 32, budget: str = "W4A6") -> GraphModule:
    x = images(3, size)
    recipe = RECIPES["naive_min_max"](budget, bits=(4, 6), allocator=Uniform())
    return recipe.run(traced(scrambled(model), x), PassContext(x))


def lower(graph_module: GraphModule, chains: bool = False) -> GraphModule:
    return Pipeline([Lower("cpu-native", chains)], assumes=[QUANTIZED]).run(graph_module, PassContext())


def assert_lowered_right(simulated: GraphModule, low: GraphModule, size: int = 32) -> None:
    x = images(6, size, seed=4)
    with torch.inference_mode():
        wanted = simulated(x)
        off = (low(x) - wanted).abs().amax(1) / wanted.abs().amax()
    # Most images agree to float rounding; in the others a code beside a threshold falls the other way.
    assert off.median() < 1e-5
    assert off.max() < 0.1


def kinds(graph_module: GraphModule) -> list[str]:
    """Whole attentions, by class; what is inside another one is not counted."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    modules = [graph_module.get_submodule(str(node.target)) for node in nodes]
    return [type(module).__name__ for module in modules if isinstance(module, IntegerAttention | SeparateAttention)]


@pytest.mark.parametrize("name", DIRECT)
def test_attention_reads_what_linear_layers_give(name: str) -> None:
    simulated = quantized(Model(DIRECT[name]))
    low = lower(simulated)
    assert kinds(low) == ["IntegerAttention"] * 2
    assert all(kernel.split()[0] != "matmul" for kernel in execution_of(low).values())
    assert "simulated" not in execution_of(low).values()
    assert_lowered_right(simulated, low)
    x = images(3, seed=6)
    with torch.inference_mode():
        assert torch.equal(lower(simulated, chains=True)(x), low(x))


@pytest.mark.parametrize("attend", [rotated, hugging_face])
def test_what_is_computed_between_layers_and_attention_keeps_it_one_node(attend: Attend) -> None:
    simulated = quantized(Model(attend))
    for module in simulated.modules():
        # Layers of queries, keys and values with quantizers of their own for what they all read.
        if isinstance(module, QuantizedLinear) and attend is hugging_face:
            assert isinstance(module.input_quantizer, UniformQuantizer)
            module.input_quantizer.scale *= 1 + 1e-3 * torch.rand(())
    low = lower(simulated)
    assert kinds(low) == ["SeparateAttention"] * 2
    assert_lowered_right(simulated, low)
    x = images(3, seed=6)
    with torch.inference_mode():
        assert torch.equal(lower(simulated, chains=True)(x), low(x))


@pytest.mark.parametrize(
    ("name", "size", "kind"),
    [
        ("eva02_tiny_patch14_224", 28, "SeparateAttention"),
        ("eva02_base_patch14_224", 28, "SeparateAttention"),
        ("vit_base_patch16_clip_224", 32, "IntegerAttention"),
    ],
)
def test_eva02_and_clip_have_one_node_for_attention(name: str, size: int, kind: str) -> None:
    simulated = quantized(timm.create_model(name, img_size=size, **SMALL), size)
    low = lower(simulated)
    assert kinds(low) == [kind]
    assert "simulated" not in execution_of(low).values()
    assert_lowered_right(simulated, low, size)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_computes_runs_in_parts_and_the_report_says_why(name: str) -> None:
    attend, reason = REFUSED[name]
    options: dict[str, Any] = {"recipe": "naive_min_max", "allocator": Uniform(), "cache": None}
    found = fxquant.compile(scrambled(Model(attend)), "W8A8", calibration=images(3), **options)
    low = found.lowered("cpu-native")
    assert kinds(low.graph_module) == []
    assert_lowered_right(found.graph_module, low.graph_module)
    text = str(low.report())
    assert "What could run faster" in text
    assert "attention in parts" in text
    assert reason in " ".join(text.split())
    assert "What could run faster" not in str(found.report())
