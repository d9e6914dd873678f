"""Attention as one integer node: only where the graph and the shapes noted in it agree, each with a name of its own."""

from __future__ import annotations

import pytest
import torch

from allocators.uniform import Uniform
from fxquant.graph.annotation import Role, nodes_with_role
from fxquant.graph.facts import QUANTIZED
from fxquant.runtime.integer.lowered import IntegerAttention
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import RECIPES
from tests.lowering import lower, needs_kernels
from tests.models import images, scrambled, traced
from tests.shared_layers import Transformer


@pytest.fixture(scope="module")
def simulated() -> torch.fx.GraphModule:
    """Attentions of layers that stand in lists, quantized; not to be changed."""
    x = images(4, 16)
    recipe = RECIPES["naive_min_max"]("W8A8", bits=(8,), allocator=Uniform())
    return recipe.run(traced(scrambled(Transformer("lists")), x), PassContext(x))


@needs_kernels
@pytest.mark.parametrize("chains", [False, True])
def test_attentions_of_one_scope_do_not_replace_each_other(simulated: torch.fx.GraphModule, chains: bool) -> None:
    low, x = lower(simulated, chains=chains), images(6, 16, seed=4)
    with torch.inference_mode():
        wanted = simulated(x)
        assert (low(x) - wanted).square().mean() < 1e-4 * wanted.square().mean()
    targets = [n.target for n in low.graph.nodes if "integer_attention" in str(n.target)]
    assert targets == ([] if chains else ["integer_attention", "integer_attention_1"])


@needs_kernels
@pytest.mark.parametrize("role", [Role.AV, "split"])
def test_shapes_that_the_graph_contradicts_are_not_believed(simulated: torch.fx.GraphModule, role: Role | str) -> None:
    graph_module = Pipeline([], assumes=[QUANTIZED]).run(simulated, PassContext())
    nodes = nodes_with_role(graph_module, Role.AV)
    if role == "split":
        nodes += [n for n in graph_module.graph.nodes if n.target in ("reshape", "view") and len(n.args) > 4]
    for node in nodes:
        meta = node.meta["tensor_meta"]
        shape = list(meta.shape)
        first, second = (3, 4) if len(shape) == 5 else (1, 3)
        shape[first], shape[second] = shape[second], shape[first]
        node.meta["tensor_meta"] = meta._replace(shape=torch.Size(shape))
    low, x = lower(graph_module, chains=False), images(6, 16, seed=4)
    assert not any(isinstance(module, IntegerAttention) for module in low.modules())
    with torch.inference_mode():
        wanted = simulated(x)
        assert (low(x) - wanted).square().mean() < 1e-4 * wanted.square().mean()
