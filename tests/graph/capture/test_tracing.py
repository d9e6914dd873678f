"""Tracing: one normal form, exact, without touching the model; and what is refused, with which words."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from fxquant.errors import CalibrationError, CoverageError, ModelError, TraceError
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import TRACED, facts_of
from fxquant.graph.notes import COVERAGE
from fxquant.graph.printer import format_graph

pytestmark = pytest.mark.quick

IMAGES_BCHW = torch.rand(2, 3, 8, 8)


def tiny_vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    kwargs = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "num_heads": 2, "depth": 1, "num_classes": 5} | options
    return timm.models.VisionTransformer(**kwargs)


class Block(nn.Module):
    """A body around one function of the embedded image."""

    def __init__(self, body) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.ones(6, 6))
        self.body = body

    def forward(self, image):
        return self.head(self.body(self, self.embed(image).flatten(2).transpose(1, 2)).mean(1))


def operations(graph_module) -> list[str]:
    return [
        type(graph_module.get_submodule(n.target)).__name__ if n.op == "call_module" else str(n.target)
        for n in graph_module.graph.nodes
    ]


def test_graph_equals_model_at_any_batch_size() -> None:
    model = tiny_vit().eval()
    graph_module = trace(model, IMAGES_BCHW)
    for batch_size in (1, 2, 5):
        images_bchw = torch.rand(batch_size, 3, 8, 8)
        torch.testing.assert_close(graph_module(images_bchw), model(images_bchw))
    assert TRACED in facts_of(graph_module)
    assert COVERAGE.of(graph_module) == 1.0


def test_model_is_untouched() -> None:
    model = tiny_vit().train()
    state = copy.deepcopy(model.state_dict())
    fused = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
    graph_module = trace(model, IMAGES_BCHW)
    with torch.no_grad():
        for parameter in graph_module.parameters():
            parameter.zero_()
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")] == fused
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)


GOLDEN = """\
%x = image()
%getattr_4 = getattr(%x, 'shape')
%getitem_7 = getitem(%getattr_4, 1:)
%eq = eq(%getitem_7, (3, 8, 8))
%_assert = _assert(%eq, 'this graph takes images of shape (B, 3, 8, 8): resize them or trace again')
%patch_embed_proj = Conv2d(%x)
%flatten = flatten(%patch_embed_proj, 2)
%transpose = transpose(%flatten, 1, 2)
%getattr_2 = getattr(%transpose, 'shape')
%getitem_1 = getitem(%getattr_2, 0)
%cls_token = constant(cls_token)
%expand = expand(%cls_token, %getitem_1, -1, -1)
%cat = cat((%expand, %transpose), dim=1)
%pos_embed = constant(pos_embed)
%add = add(%cat, %pos_embed)
%blocks_0_norm1 = LayerNorm(%add)
"""


def test_golden_text() -> None:
    text = format_graph(trace(tiny_vit(), IMAGES_BCHW))
    assert text.startswith(GOLDEN)
    assert "dropout" not in text.lower()
    assert "identity" not in text.lower()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda m, x: x.softmax(-1), "Softmax"),
        (lambda m, x: functional.softmax(x, dim=1), "Softmax"),
        (lambda m, x: torch.softmax(x, 2), "Softmax"),
        (lambda m, x: functional.gelu(x, approximate="tanh"), "GELU"),
        (lambda m, x: functional.linear(x, m.scale), "Linear"),
        (lambda m, x: functional.linear(x, m.scale * 2, torch.cat([m.scale[0, :3], m.scale[1, :3]])), "Linear"),
        (lambda m, x: functional.layer_norm(x, (6,)), "LayerNorm"),
        (lambda m, x: functional.layer_norm(x, (6,), m.norm.weight, m.norm.bias), "LayerNorm"),
    ],
)
def test_functions_become_modules(body, expected: str) -> None:
    assert operations(trace(Block(body), IMAGES_BCHW)).count(expected) == 1 + (expected == "Linear")


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x @ x.transpose(1, 2) @ x,
        lambda m, x: torch.matmul(torch.bmm(x, x.transpose(1, 2)), x),
        lambda m, x: x.matmul(x.transpose(1, 2)).bmm(x),
        lambda m, x: functional.scaled_dot_product_attention(x, x, x),
    ],
)
def test_products_of_activations_have_one_form(body) -> None:
    assert operations(trace(Block(body), IMAGES_BCHW)).count(str(torch.matmul)) == 2


def test_assignment_to_slices_is_traced() -> None:
    def body(m, x):
        x = x * 1
        x[:, 1:, :3] = x[:, 1:, :3] * 2
        return x

    model = Block(body).eval()
    torch.testing.assert_close(trace(model, IMAGES_BCHW)(IMAGES_BCHW), model(IMAGES_BCHW))


def test_shape_arithmetic_leaves_nothing() -> None:
    def body(m, x):
        batch, tokens, channels = x.shape
        return x.view(batch, tokens // 2, 2, channels).flatten(1, 2) if tokens % 2 == 0 else x

    text = format_graph(trace(Block(body), IMAGES_BCHW))
    assert "floordiv" not in text
    assert "view(%transpose, %getitem, 2, 2, 6)" in text


def test_control_flow_on_values_names_file_and_line() -> None:
    def body(m, x):
        return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"test_tracing\.py:\d+ in body: `return x if x\.sum\(\) > 0 else -x`"):
        trace(Block(body), IMAGES_BCHW)


def test_randomness_is_refused() -> None:
    with pytest.raises(TraceError, match="differs from the model"):
        trace(Block(lambda m, x: x + torch.rand(())), IMAGES_BCHW)


def test_attention_that_compiles_itself_is_refused() -> None:
    def body(m, x):  # flex_attention itself takes seconds to refuse
        if isinstance(x, torch.fx.Proxy) or torch.compiler.is_exporting():
            raise RuntimeError("Attempted to inline torch.ops.higher_order.flex_attention")
        return x

    with pytest.raises(TraceError, match="call scaled_dot_product_attention in its place"):
        trace(Block(body), IMAGES_BCHW)


def test_hidden_weights_are_refused() -> None:
    model = Block(lambda m, x: m.attention(x)[0])
    model.attention = nn.GRU(6, 6, batch_first=True)
    with pytest.raises(CoverageError, match=r"'attention' \(GRU, 216 elements\)"):
        trace(model, IMAGES_BCHW)
    assert COVERAGE.of(trace(model, IMAGES_BCHW, minimum_coverage=0.5)) < 0.8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = value
    with pytest.raises(ModelError, match=r"'blocks\.0\.mlp\.fc1\.weight' has NaN or infinite"):
        trace(model, IMAGES_BCHW)


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(ModelError, match="no parameters"):
        trace(nn.Flatten(), IMAGES_BCHW)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (IMAGES_BCHW[0], "images are"),
        (IMAGES_BCHW[:0], "images are"),
        ((IMAGES_BCHW * 255).byte(), "scale the images to float"),
        (IMAGES_BCHW / 0 * 0, "NaN or infinite"),
        ([1, 2], "not a tensor"),
        (torch.rand(1, 3, 16, 16), r"the model takes \(B, 3, 8, 8\)"),
    ],
)
def test_wrong_examples_are_refused(example, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        trace(tiny_vit(), example)


def test_images_of_another_size_are_refused_at_run_time() -> None:
    with pytest.raises(AssertionError, match=r"images of shape \(B, 3, 8, 8\)"):
        trace(tiny_vit(), IMAGES_BCHW)(torch.rand(1, 3, 16, 16))
