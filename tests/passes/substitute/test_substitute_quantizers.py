from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.fx import GraphModule
from torch.nn import functional

from allocators.greedy import Greedy
from allocators.uniform import Uniform
from fxquant.errors import InfeasibleBudgetError, OverrideError
from fxquant.graph.annotation import Annotation, Role, annotation_of, nodes_with_role
from fxquant.graph.printer import format_graph
from passes.allocate.allocate_bits import AllocateBits
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import mptq_vit
from passes.search.insert_observers import observer_nodes
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers, chosen
from tests.models import images, traced, vit

pytestmark = pytest.mark.quick

BITS = (3, 4, 5, 6, 8)

QUANTIZED = """\
%patch_embed_proj = patch_embed[w5a8](%x)
%flatten = flatten(%patch_embed_proj, 2)
%transpose = transpose(%flatten, 1, 2)
%getattr_2 = getattr(%transpose, 'shape')
%getitem_1 = getitem(%getattr_2, 0)
%cls_token = constant(cls_token)
%expand = expand(%cls_token, %getitem_1, -1, -1)
%cat = cat((%expand, %transpose), dim=1)
%pos_embed = constant(pos_embed)
%add = add(%cat, %pos_embed)
%blocks_0_norm1 = layer_norm(%add)
%getattr_3 = getattr(%blocks_0_norm1, 'shape')
%getitem_2 = getitem(%getattr_3, 0)
%blocks_0_attn_qkv = qkv[w5a4](%blocks_0_norm1)
%reshape = reshape(%blocks_0_attn_qkv, %getitem_2, 5, 3, 3, 8)
%permute = permute(%reshape, 2, 0, 3, 1, 4)
%unbind = unbind(%permute, 0)
%getitem_3 = getitem(%unbind, 0)
%getitem_4 = getitem(%unbind, 1)
%getitem_5 = getitem(%unbind, 2)
%mul = mul(%getitem_3, 0.3535533905932738)
%transpose_1 = transpose(%getitem_4, -2, -1)
%matmul_2 = qk[a4](%mul, %transpose_1)
%blocks_0_attn_softmax = softmax(%matmul_2)
%matmul_3 = av[a4](%blocks_0_attn_softmax, %getitem_5)
%transpose_2 = transpose(%matmul_3, 1, 2)
%reshape_1 = reshape(%transpose_2, %getitem_2, 5, 24)
%blocks_0_attn_proj = proj[w5a4](%reshape_1)
%add_1 = add(%add, %blocks_0_attn_proj)
%blocks_0_norm2 = layer_norm(%add_1)
%blocks_0_mlp_fc1 = fc1[w5a4](%blocks_0_norm2)
%blocks_0_mlp_act = gelu(%blocks_0_mlp_fc1)
%blocks_0_mlp_fc2 = fc2[w5a4](%blocks_0_mlp_act)
%add_2 = add(%add_1, %blocks_0_mlp_fc2)
%norm = layer_norm(%add_2)
%getitem_6 = getitem(%norm, (:, 0))
%head = head[w5a4](%getitem_6)
return %head"""


@pytest.fixture(scope="module")
def searched() -> GraphModule:
    """One block, candidates found; Pipeline.run copies it."""
    pipeline = mptq_vit("W8A8", bits=BITS)
    head = pipeline[: pipeline.position(AllocateBits)]
    return head.run(traced(vit(depth=1), images(2)), PassContext(images()))


def tail(budget: object, **options: object) -> Pipeline:
    pipeline = mptq_vit(budget, bits=BITS, **{"allocator": Uniform(), **options})  # type: ignore[arg-type]
    return pipeline[pipeline.position(AllocateBits) :]


def annotations(graph_module: GraphModule) -> dict[str, Annotation]:
    return {annotation_of(node).layer: annotation_of(node) for node in nodes_with_role(graph_module)}


def test_golden_text(searched: GraphModule) -> None:
    quantized = tail("W5A4").run(searched, PassContext())
    assert format_graph(quantized).endswith(QUANTIZED)
    assert observer_nodes(quantized) == []
    assert not any("observer" in name for name, _ in quantized.named_modules())


def test_outputs_are_those_of_quantizers_applied_by_hand(searched: GraphModule) -> None:
    quantized = tail("W5A4").run(searched, PassContext())
    found = annotations(quantized)

    def weight(layer: str) -> torch.Tensor:
        candidate = chosen(found[layer].weight, layer)
        matrix = searched.get_submodule(layer).weight
        return candidate.quantizer(matrix.flatten(1)).reshape(matrix.shape)

    def operand(layer: str, x: torch.Tensor, bits: int = 4, index: int = 0) -> torch.Tensor:
        return chosen(replace(found[layer].inputs[index], bits=bits), layer).quantizer(x)

    def linear(layer: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(operand(layer, x), weight(layer), searched.get_submodule(layer).bias)

    for batch_size in (1, 5):
        x = images(batch_size, seed=7)
        count, patch = len(x), searched.get_submodule("patch_embed.proj")
        y = functional.conv2d(operand("patch_embed.proj", x, 8), weight("patch_embed.proj"), patch.bias, patch.stride)
        y = torch.cat([searched.cls_token.expand(count, -1, -1), y.flatten(2).transpose(1, 2)], 1) + searched.pos_embed
        qkv = linear("blocks.0.attn.qkv", searched.get_submodule("blocks.0.norm1")(y))
        q, k, v = qkv.reshape(count, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
        qk = "blocks.0.attn.qk"
        scores = operand(qk, q * 8**-0.5) @ operand(qk, k.transpose(-2, -1), index=1)
        mixed = operand("blocks.0.attn.av", scores.softmax(-1)) @ operand("blocks.0.attn.av", v, index=1)
        y = y + linear("blocks.0.attn.proj", mixed.transpose(1, 2).reshape(count, 5, 24))
        hidden = functional.gelu(linear("blocks.0.mlp.fc1", searched.get_submodule("blocks.0.norm2")(y)))
        y = y + linear("blocks.0.mlp.fc2", hidden)
        expected = linear("head", searched.get_submodule("norm")(y)[:, 0])
        assert torch.allclose(quantized(x), expected, rtol=1e-4, atol=1e-4)


def test_the_searched_graph_is_untouched(searched: GraphModule) -> None:
    before, state = format_graph(searched), copy.deepcopy(searched.state_dict())
    tail("W5A4").run(searched, PassContext())
    assert format_graph(searched) == before
    assert all(torch.equal(value, state[name]) for name, value in searched.state_dict().items())


class TestOverrides:
    def test_name_glob_and_role_reach_the_nodes(self, searched: GraphModule) -> None:
        overrides = {"blocks.0.mlp.fc2": 8, "*.attn.q*": (None, 6), Role.HEAD: (3, 5)}
        found = annotations(tail("W6A6", overrides=overrides, allocator=Greedy()).run(searched, PassContext()))
        assert (found["blocks.0.mlp.fc2"].weight_bits, found["blocks.0.mlp.fc2"].input_bits[-1]) == (8, 8)
        assert found["blocks.0.attn.qk"].input_bits[-1] == 6
        assert found["blocks.0.attn.qkv"].input_bits[-1] == 6
        assert (found["head"].weight_bits, found["head"].input_bits[-1]) == (3, 5)
        assert found["head"].operands[0].pinned
        assert not found["blocks.0.attn.proj"].operands[0].pinned

    def test_later_ones_win(self, searched: GraphModule) -> None:
        overrides = {"*": 6, "head": 3}
        found = annotations(tail("W8A8", overrides=overrides).run(searched, PassContext()))
        assert found["head"].weight_bits == 3
        assert found["blocks.0.mlp.fc1"].weight_bits == 6

    def test_first_and_last(self, searched: GraphModule) -> None:
        found = annotations(tail("W7A5", first_last_bits=8, allocator=Greedy()).run(searched, PassContext()))
        assert found["patch_embed.proj"].weight_bits == 8
        assert (found["head"].weight_bits, found["head"].input_bits[-1]) == (8, 8)
        assert found["head"].operands[0].pinned
        assert found["blocks.0.mlp.fc1"].weight_bits < 8

    def test_mistakes_are_typed(self, searched: GraphModule) -> None:
        with pytest.raises(OverrideError, match=r"blocks\.0\.mlp\.fc2"):
            tail("W5A5", overrides={"blocks.0.mlp.fc22": 8}).run(searched, PassContext())
        with pytest.raises(OverrideError):
            tail("W5A5", overrides={"head": 7}).run(searched, PassContext())
        with pytest.raises(InfeasibleBudgetError):
            tail("W2A2", allocator=Greedy()).run(searched, PassContext())


def test_weights_are_held_as_codes(searched: GraphModule) -> None:
    quantized = tail("W5A4").run(searched, PassContext())
    fc1 = quantized.get_submodule("blocks.0.mlp.fc1")
    assert fc1.weight_codes.dtype == torch.int8
    assert -16 <= int(fc1.weight_codes.min()) <= int(fc1.weight_codes.max()) <= 15
    assert "blocks.0.mlp.fc1.weight" not in quantized.state_dict()
    before = fc1.weight.clone()
    fc1.refresh()
    assert torch.equal(fc1.weight, before)


def test_bits_the_layers_do_not_have_are_left_out() -> None:
    """Matmuls have no weight bits, and the patch embedding's image may stay in float."""
    pipeline = mptq_vit("W5A4", bits=BITS).changed(PlanOperands, image=None)
    quantized = pipeline.run(traced(vit(depth=1), images(2)), PassContext(images()))
    text = format_graph(quantized)
    assert "%patch_embed_proj = patch_embed[w" in text
    patch_embed = annotations(quantized)["patch_embed.proj"]
    assert patch_embed.input_bits[-1] is None
    assert quantized.get_submodule("patch_embed.proj").input_quantizer is None


def test_fully_quantized_norms_and_softmax_compute_on_quantized_inputs() -> None:
    pipeline = mptq_vit("W5A5", bits=BITS, fully_quantized=True)
    quantized = pipeline.run(traced(vit(depth=1), images(2)), PassContext(images()))
    seen = []
    quantized.get_submodule("blocks.0.norm1").inner.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    quantized(images(3))
    bits = annotations(quantized)["blocks.0.norm1"].input_bits[-1]
    for channel in range(24):
        assert len(seen[0][..., channel].unique()) <= 2**bits
    assert SearchScales in {type(step) for step in pipeline}
    assert SubstituteQuantizers in {type(step) for step in pipeline}
