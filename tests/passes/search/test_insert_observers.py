from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import PatternError
from fxquant.graph.annotation import Role, Source
from fxquant.graph.printer import format_graph
from fxquant.quantizers.families import text_of
from passes.pipeline.contract import PassContext
from passes.search.calibrate import STATISTICS
from passes.search.insert_observers import InsertObservers, observer_nodes, observers_of, remove_observers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SCALES_SEARCHED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED
from tests.assertions import assert_rewrites
from tests.models import SWIN, images, timm_model, traced, vit

FULLY = PlanOperands(softmax_input="symmetric", layer_norm_input="o-2sf")

ATTENTION_AND_MLP = """\
%observer_blocks_0_attn_qkv_0 = Observer(%blocks_0_norm1)
%blocks_0_attn_qkv = qkv(%observer_blocks_0_attn_qkv_0)
%reshape = reshape(%blocks_0_attn_qkv, %getitem_2, 5, 3, 3, 8)
%permute = permute(%reshape, 2, 0, 3, 1, 4)
%unbind = unbind(%permute, 0)
%getitem_3 = getitem(%unbind, 0)
%getitem_4 = getitem(%unbind, 1)
%getitem_5 = getitem(%unbind, 2)
%mul = mul(%getitem_3, 0.3535533905932738)
%transpose_1 = transpose(%getitem_4, -2, -1)
%observer_blocks_0_attn_qk_0 = Observer(%mul)
%observer_blocks_0_attn_qk_1 = Observer(%transpose_1)
%matmul_2 = qk(%observer_blocks_0_attn_qk_0, %observer_blocks_0_attn_qk_1)
%blocks_0_attn_softmax = softmax(%matmul_2)
%observer_blocks_0_attn_av_0 = Observer(%blocks_0_attn_softmax)
%observer_blocks_0_attn_av_1 = Observer(%getitem_5)
%matmul_3 = av(%observer_blocks_0_attn_av_0, %observer_blocks_0_attn_av_1)
%transpose_2 = transpose(%matmul_3, 1, 2)
%reshape_1 = reshape(%transpose_2, %getitem_2, 5, 24)
%observer_blocks_0_attn_proj_0 = Observer(%reshape_1)
%blocks_0_attn_proj = proj(%observer_blocks_0_attn_proj_0)
%add_1 = add(%add, %blocks_0_attn_proj)
%blocks_0_norm2 = layer_norm(%add_1)
%observer_blocks_0_mlp_fc1_0 = Observer(%blocks_0_norm2)
%blocks_0_mlp_fc1 = fc1(%observer_blocks_0_mlp_fc1_0)
%blocks_0_mlp_act = gelu(%blocks_0_mlp_fc1)
%observer_blocks_0_mlp_fc2_0 = Observer(%blocks_0_mlp_act)
%blocks_0_mlp_fc2 = fc2(%observer_blocks_0_mlp_fc2_0)
%add_2 = add(%add_1, %blocks_0_mlp_fc2)
%norm = layer_norm(%add_2)
%getitem_6 = getitem(%norm, (:, 0))
%observer_head_0 = Observer(%getitem_6)
%head = head(%observer_head_0)
return %head"""


def insert(graph_module: torch.fx.GraphModule, plan: PlanOperands = PlanOperands()) -> torch.fx.GraphModule:  # noqa: B008
    """Planned and observed, in place."""
    plan.apply(graph_module, PassContext())
    InsertObservers().apply(graph_module, PassContext())
    return graph_module


def planned(plan: PlanOperands = PlanOperands()) -> torch.fx.GraphModule:  # noqa: B008
    graph_module = traced(vit(depth=1), images(2))
    plan.apply(graph_module, PassContext())
    return graph_module


def observed(plan: PlanOperands = PlanOperands()) -> torch.fx.GraphModule:  # noqa: B008
    return insert(planned(plan), plan)


@pytest.mark.quick
def test_norms_and_softmax_in_float() -> None:
    graph_module = planned()
    assert_rewrites(graph_module, InsertObservers(), ATTENTION_AND_MLP)
    text = format_graph(graph_module)
    assert "%observer_patch_embed_proj_0 = Observer(%x)\n%patch_embed_proj = patch_embed(%observer_patch" in text
    assert text.count("Observer(") == 10


@pytest.mark.quick
def test_fully_quantized() -> None:
    expected = ATTENTION_AND_MLP
    for layer, name, source in [
        ("softmax", "blocks_0_attn_softmax", "matmul_2"),
        ("layer_norm", "blocks_0_norm2", "add_1"),
        ("layer_norm", "norm", "add_2"),
    ]:
        inserted = f"%observer_{name}_0 = Observer(%{source})\n%{name} = {layer}(%observer_{name}_0)"
        expected = expected.replace(f"%{name} = {layer}(%{source})", inserted)
    graph_module = planned(FULLY)
    assert_rewrites(graph_module, InsertObservers(), expected)
    assert format_graph(graph_module).count("Observer(") == 14


def test_the_graph_computes_the_same() -> None:
    x = images(3)
    assert torch.equal(observed(FULLY)(x), traced(vit(depth=1), images(2))(x))


@pytest.mark.parametrize("plan", [PlanOperands(), FULLY], ids=["float norms", "fully"])
def test_twice_is_once(plan: PlanOperands) -> None:
    graph_module = observed(plan)
    names = list(graph_module.state_dict())
    assert_rewrites(graph_module, InsertObservers(), format_graph(graph_module))
    assert list(graph_module.state_dict()) == names


def test_another_protocol_replaces_the_first() -> None:
    graph_module = insert(observed(FULLY))
    assert format_graph(graph_module) == format_graph(observed())
    assert not any("norm" in name for name, _ in graph_module.named_modules() if name.startswith("observer"))


def test_removal_leaves_the_graph_as_it_was() -> None:
    graph_module = observed(FULLY)
    assert remove_observers(graph_module) == 14
    assert format_graph(graph_module) == format_graph(traced(vit(depth=1), images(2)))
    assert remove_observers(graph_module) == 0


def test_families_and_edges() -> None:
    graph_module = observed(FULLY)
    found = {
        (node.name, index): (observer.source, text_of(observer.families), observer.keeps_gram)
        for node in graph_module.graph.nodes
        for index, observer in observers_of(graph_module, node)
    }
    assert found == {
        ("patch_embed_proj", 0): (Source.IMAGE, "symmetric", True),
        ("blocks_0_norm1", 0): (Source.LAYER_NORM_INPUT, "o-2sf", False),
        ("blocks_0_attn_qkv", 0): (Source.POST_LAYER_NORM, "symmetric", True),
        ("matmul_2", 0): (Source.OTHER, "symmetric", False),
        ("matmul_2", 1): (Source.OTHER, "symmetric", False),
        ("blocks_0_attn_softmax", 0): (Source.SOFTMAX_INPUT, "symmetric", False),
        ("matmul_3", 0): (Source.POST_SOFTMAX, "twin-softmax", False),
        ("matmul_3", 1): (Source.OTHER, "symmetric", False),
        ("blocks_0_attn_proj", 0): (Source.OTHER, "symmetric", True),
        ("blocks_0_norm2", 0): (Source.LAYER_NORM_INPUT, "o-2sf", False),
        ("blocks_0_mlp_fc1", 0): (Source.POST_LAYER_NORM, "symmetric", True),
        ("blocks_0_mlp_fc2", 0): (Source.POST_GELU, "opt-m", True),
        ("norm", 0): (Source.LAYER_NORM_INPUT, "o-2sf", False),
        ("head", 0): (Source.OTHER, "symmetric", True),
    }


def test_swin_windows_do_not_hide_what_flows() -> None:
    graph_module = traced(timm_model("swin_tiny_patch4_window7_224", **SWIN), images(2, 56))
    insert(graph_module)
    edges = [o.source for node in graph_module.graph.nodes for _, o in observers_of(graph_module, node)]
    assert edges.count(Source.POST_SOFTMAX) == 4
    assert edges.count(Source.POST_GELU) == 4
    assert edges.count(Source.IMAGE) == 1
    assert len(edges) == len(observer_nodes(graph_module))


def test_an_image_in_float_still_gets_the_gram_matrix() -> None:
    graph_module = observed(PlanOperands(image=None))
    (patch_embed,) = [node for node in graph_module.graph.nodes if node.name == "patch_embed_proj"]
    ((_, observer),) = observers_of(graph_module, patch_embed)
    assert observer.families == ()
    assert observer.keeps_gram


def test_unknown_families_are_refused_with_the_known_ones() -> None:
    with pytest.raises(PatternError, match=r"'sigmoid'; there are .*opt-m, .*symmetric"):
        PlanOperands(post_gelu="sigmoid")


def test_what_was_known_of_the_old_observers_no_longer_holds() -> None:
    for step in (PlanOperands(), InsertObservers()):
        assert all(fact.falls_with(step.provides) for fact in (*STATISTICS, SCALES_SEARCHED, BITS_ALLOCATED))


def test_convolutions_that_pad_otherwise_are_refused() -> None:
    class Convolves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 3, padding=1)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).flatten(2).mean(2))

    torch.manual_seed(0)
    graph_module = traced(Convolves().eval(), images(2, 16))
    graph_module.get_submodule("embed").padding_mode = "circular"  # tracing writes such padding out
    with pytest.raises(PatternError, match="convolution embed pads with 'circular'"):
        PlanOperands().apply(graph_module, PassContext())


def test_nodes_of_some_roles_only() -> None:
    graph_module = observed(PlanOperands(roles=(Role.QKV, Role.AV)))
    names = [node.name for node in observer_nodes(graph_module)]
    assert names == [f"observer_blocks_0_attn_{name}" for name in ("qkv_0", "av_0", "av_1")]
