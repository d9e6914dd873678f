"""Chains of layers as one node: which there are, and the same bits as without them."""

from __future__ import annotations

import copy

import pytest
import torch

from fxquant.graph.nodes import module_of
from fxquant.graph.notes import execution_of
from fxquant.graph.printer import format_graph
from fxquant.runtime.integer.chain import IntegerChain
from fxquant.runtime.integer.lowered import LayerNormToCodes
from passes.lower.integer_plan import layer_of
from passes.lower.rewrite import MISSES
from passes.lower.rewrites.fuse_chains import FuseChains
from passes.pipeline.contract import PassContext
from tests.lowering import lower, needs_kernels, quantized
from tests.models import ARCHITECTURES, images


@needs_kernels
@pytest.mark.parametrize("architecture", ["vit", "deit distilled", "deit3", "swin", "swin that pads"])
def test_chains_give_the_same_bits(architecture: str) -> None:
    graph_module, x = quantized(architecture), images(5, ARCHITECTURES[architecture]()[1], seed=5)
    apart, chained = lower(copy.deepcopy(graph_module)), lower(graph_module, chains=True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.inference_mode():
                for batch in (x, x[:1]):
                    assert torch.equal(chained(batch), apart(batch))
    finally:
        torch.set_num_threads(threads)
    assert execution_of(chained) == execution_of(apart)
    assert "IntegerChain" in format_graph(chained)


@needs_kernels
def test_blocks_of_a_vit_are_chains() -> None:
    low = lower(quantized("vit"), chains=True)
    text = format_graph(low)
    assert "attention" not in text
    # All but the last; up to the last attention; the last MLP, on the class token.
    found = [module for module in low.modules() if isinstance(module, IntegerChain)]
    assert [chain.steps for chain in found] == [7, 3, 3]
    assert [chain.gives_codes for chain in found] == [False, True, False]


@needs_kernels
def test_blocks_of_a_swin_are_chains() -> None:
    low = lower(quantized("swin"), chains=True)
    assert "attention" not in format_graph(low)
    found = [module for module in low.modules() if isinstance(module, IntegerChain)]
    assert [chain.steps for chain in found] == [7, 7, 2, 7, 7]
    assert [chain.tokens for chain in found] == [16, 16, 1, 16, 16]
    assert [chain.parts for chain in found] == [1, 1, 4, 1, 1]


@needs_kernels
def test_layers_that_are_in_no_chain_are_misses() -> None:
    whole, context = lower(quantized("vit")), PassContext()
    FuseChains().apply(whole, context)
    (miss,) = context.journal.pending[MISSES]
    assert miss["layer"] == "blocks.1.attn.proj", "of the class token alone, which is taken before"
    assert "this layer reads 'getitem'" in miss["reason"]
    context = PassContext()
    apart = lower(quantized("vit"))
    norm = next(node for node in apart.graph.nodes if isinstance(module_of(apart, node), LayerNormToCodes))
    with apart.graph.inserting_after(norm):
        copied = apart.graph.call_method("clone", (norm,))
    copied.meta["tensor_meta"] = norm.meta["tensor_meta"]
    norm.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)
    FuseChains().apply(apart, context)
    missed = {miss["layer"]: miss["reason"] for miss in context.journal.pending[MISSES]}
    assert "'clone' reads its result" in missed.pop(layer_of(norm))
    assert any("this layer reads 'clone'" in reason for reason in missed.values())
