"""Models that use a block, a layer or a weight several times compute the same: compiled, lowered, saved, loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from allocators.uniform import Uniform
from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.runtime.native import library
from passes.recipes import RECIPES
from tests.lowering import needs_kernels
from tests.models import images, scrambled, traced
from tests.shared_layers import SHARED, Transformer


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean() / wanted.square().mean())


@needs_kernels
@pytest.mark.parametrize("shared", SHARED)
def test_what_is_shared_compiles_lowers_saves_and_loads(shared: str, tmp_path: Path) -> None:
    model, x = scrambled(Transformer(shared)), images(4, 16)
    pipeline = RECIPES["mptq_vit"]("W8A8", bits=(8,), allocator=Uniform())
    compiled = fxquant.compile(model, None, calibration=x, recipe=pipeline)
    compiled.save(tmp_path / "model.fxq")
    loaded, lowered = fxquant.load(tmp_path / "model.fxq"), compiled.lowered("cpu-native")
    with torch.inference_mode():
        simulated = compiled(x)
        assert distance(simulated, model(x)) < 0.01
        assert distance(lowered(x), simulated) < 1e-4
        assert torch.equal(loaded(x), simulated)
        assert torch.equal(loaded.lowered("cpu-native")(x), lowered(x))
    layers = [row.layer for row in compiled.layers]
    assert len(layers) == len(set(layers))
    assert all(row.execution.endswith(library.instruction_set()) for row in lowered.layers)


def test_each_call_of_a_shared_layer_is_a_layer_of_its_own() -> None:
    graph_module = traced(scrambled(Transformer("block")), images(2, 16))
    rows = {annotation_of(node).layer: annotation_of(node) for node in nodes_with_role(graph_module)}
    assert {"blocks.0.attn.qkv", "blocks.0.attn.qkv_1", "blocks.0.attn.qk", "blocks.0.attn.qk_1"} <= rows.keys()
    assert rows["blocks.0.attn.qkv"].macs == rows["blocks.0.attn.qkv_1"].macs > 0
    assert (rows["blocks.0.attn.qkv"].block, rows["blocks.0.attn.qkv_1"].block) == (0, 1)


def test_names_of_the_models_own_are_kept_and_never_given_twice() -> None:
    model = scrambled(Transformer("layers"))
    model.blocks[1].attn.qkv_1 = model.blocks[0].attn.proj  # the name that the second call would have
    model.blocks[0].attn.qkv_1, model.blocks[0].attn.proj = model.blocks[0].attn.proj, torch.nn.Identity()
    graph_module = traced(model, images(2, 16))
    layers = [annotation_of(node).layer for node in nodes_with_role(graph_module)]
    assert len(layers) == len(set(layers))
