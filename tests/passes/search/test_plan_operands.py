"""PlanOperands: which operands nodes have, what they hold, and what they may become."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

import fxquant
from fxquant.errors import PatternError, VerificationError
from fxquant.graph.annotation import Annotation, Role, Source, annotation_of, nodes_with_role, planned_nodes
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import declare, verify
from passes.allocate.build_table import build_table
from passes.pipeline.contract import PassContext
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import OPERANDS_PLANNED, PlanOperands, _has_rows
from tests.models import images, traced, vit

TOKENS, CHANNELS, HEADS = 5, 24, 3


def planned(plan: PlanOperands = PlanOperands()) -> GraphModule:  # noqa: B008
    graph_module = traced(vit(depth=1), images(2))
    plan.apply(graph_module, PassContext())
    return graph_module


def by_layer(graph_module: GraphModule) -> dict[str, Annotation]:
    return {annotation_of(node).layer: annotation_of(node) for node in nodes_with_role(graph_module)}


def test_a_weight_and_its_input_or_the_inputs_of_a_product() -> None:
    found = by_layer(planned())
    kinds = {layer: [(o.argument, o.source) for o in annotation.operands] for layer, annotation in found.items()}
    assert kinds["patch_embed.proj"] == [(None, Source.WEIGHT), (0, Source.IMAGE)]
    assert kinds["blocks.0.attn.qkv"] == [(None, Source.WEIGHT), (0, Source.POST_LAYER_NORM)]
    assert kinds["blocks.0.attn.qk"] == [(0, Source.OTHER), (1, Source.OTHER)]
    assert kinds["blocks.0.attn.av"] == [(0, Source.POST_SOFTMAX), (1, Source.OTHER)]
    assert kinds["blocks.0.mlp.fc2"] == [(None, Source.WEIGHT), (0, Source.POST_GELU)]
    assert kinds["blocks.0.attn.softmax"] == [(0, Source.SOFTMAX_INPUT)]
    elements = {layer: [o.elements for o in annotation.operands] for layer, annotation in found.items()}
    assert elements["blocks.0.attn.qkv"] == [3 * CHANNELS**2, TOKENS * CHANNELS], "of one image"
    assert elements["blocks.0.attn.av"] == [HEADS * TOKENS**2, TOKENS * CHANNELS]


class Heads(nn.Module):
    """Two planes of an image under a convolution, a ReLU as module, method and function."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.convs[0](x[:, :2]))
        x = self.convs[1](x).relu()
        return self.convs[3](functional.relu(self.convs[2](x)).permute(0, 1, 3, 2))  # type: ignore[no-any-return]


def test_relu_gives_nothing_below_zero_and_planes_of_an_image_are_image() -> None:
    graph_module = traced(Heads(), images(2))
    PlanOperands(post_relu="asymmetric", other="symmetric").apply(graph_module, PassContext())
    inputs = [annotation_of(node).inputs[0] for node in planned_nodes(graph_module)]
    assert [operand.source for operand in inputs] == [Source.IMAGE] + [Source.POST_RELU] * 3
    assert [operand.families[0].name for operand in inputs] == ["symmetric"] + ["asymmetric"] * 3


def test_what_stays_float_has_no_families() -> None:
    found = by_layer(planned(PlanOperands(image=None)))
    assert [bool(o.families) for o in found["patch_embed.proj"].operands] == [True, False]
    assert not found["blocks.0.norm1"].is_planned
    assert not found["blocks.0.mlp.act"].is_planned
    fully = by_layer(planned(PlanOperands(softmax_input="symmetric", layer_norm_input="o-2sf")))
    assert fully["blocks.0.norm1"].inputs[0].families == (("o-2sf", 8),)
    assert fully["blocks.0.attn.softmax"].is_planned
    some = planned(PlanOperands(roles=(Role.FC1,)))
    assert [annotation_of(node).role for node in planned_nodes(some)] == [Role.FC1]


def test_tied_inputs_are_one_width_of_the_table_and_free_ones_two() -> None:
    graph_module = planned(PlanOperands(tied=(Role.QK,)))
    annotations = [annotation_of(node) for node in planned_nodes(graph_module)]
    groups = {annotation.layer: annotation.groups for annotation in annotations}
    assert groups["blocks.0.attn.qk"] == ((), (0, 1))
    assert groups["blocks.0.attn.av"] == groups["head"] == ((0,), (1,))
    table = build_table(annotations, (2, 4, 8), image_bits=8)
    row = table.layers.index("blocks.0.attn.qk")
    assert table.elements[:, row].tolist() == [0, 2 * TOKENS * CHANNELS]
    row = table.layers.index("blocks.0.attn.av")
    assert table.elements[:, row].tolist() == [HEADS * TOKENS**2, TOKENS * CHANNELS]
    assert table.elements[1, table.layers.index("patch_embed.proj")] == 0, "images come in 8 bits"


def test_planning_again_looks_through_observers() -> None:
    graph_module = planned()
    before = by_layer(graph_module)
    InsertObservers().apply(graph_module, PassContext())
    PlanOperands().apply(graph_module, PassContext())
    assert by_layer(graph_module) == before


def test_the_fact_needs_something_to_quantize() -> None:
    graph_module = planned(PlanOperands(roles=()))
    declare(graph_module, [OPERANDS_PLANNED])
    with pytest.raises(VerificationError, match="nothing is to be quantized; run PlanOperands"):
        verify(graph_module, OPERANDS_PLANNED)


@pytest.mark.parametrize("options", [{"weight": "log2"}, {"post_gelu": "sigmoid"}, {"tied": 4}])
def test_options_that_do_not_fit(options: dict[str, object]) -> None:
    with pytest.raises(PatternError):
        PlanOperands(**options)  # type: ignore[arg-type]


class SharedKeys(nn.Module):
    """Attention of fewer queries than keys, which two heads share; the probabilities stand on the right of values."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 5)
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        q = self.q(tokens[:, ::4]).reshape(-1, 4, 2, 8).transpose(1, 2)
        probabilities = (q @ self.k(tokens)[:, None].transpose(-2, -1)).softmax(-1)
        values = self.v(tokens)[:, None].transpose(-2, -1)
        return self.head((values @ probabilities.transpose(-2, -1)).mean((1, 3)))


def test_rows_that_are_not_a_softmaxs_get_no_family_of_rows() -> None:
    torch.manual_seed(0)
    model, x = SharedKeys().eval(), torch.randn(8, 3, 8, 8)
    found = fxquant.compile(model, "W8A8", calibration=x, progress=False)
    (product,) = (row for row in found.layers if row.role == "av")
    assert [(operand.source, operand.quantizer) for operand in product.operands] == [
        ("other", "uniform"),
        ("post_softmax", "uniform"),
    ]
    with torch.no_grad():
        assert (found(x) - model(x)).norm() < 0.05 * model(x).norm()
    straight = fxquant.compile(vit(depth=1), "W8A8", calibration=images(2), progress=False)
    assert [row.operands[0].quantizer for row in straight.layers if row.role == "av"] == ["row-log"]


@pytest.mark.parametrize(
    ("moved", "has_rows"),
    [
        (lambda p: p.transpose(1, 2), True),
        (lambda p: p.transpose(-1, -2), False),
        (lambda p: p.permute(0, 2, 1, 3), True),
        (lambda p: p.permute([0, 1, 3, 2]), False),
        (lambda p: p.reshape(-1, 6, 4), True),
        (lambda p: p.reshape(-1, 2, 2, 6), False),
        (lambda p: p.flatten(1, 2), True),
        (lambda p: p.contiguous().view(-1, 6, 4).transpose(1, 2), False),
    ],
)
def test_rows_are_followed_through_moves(moved: Callable[[Tensor], Tensor], has_rows: bool) -> None:
    graph_module = trace(Moved(moved), torch.randn(2, 2, 3, 4))
    product = graph_module.graph.output_node().args[0]
    assert _has_rows(product, 0) == has_rows


class Moved(nn.Module):
    def __init__(self, moved: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.moved, self.mix = moved, nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        p = self.moved(self.mix(x).softmax(-1))
        return torch.matmul(p, torch.ones(p.shape[-1], 3))
