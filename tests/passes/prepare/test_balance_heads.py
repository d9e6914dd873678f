"""BalanceHeads: the model computes the same, with fewer levels for q and k; what cannot be turned is left alone."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant.errors import CalibrationError
from fxquant.graph.annotation import Role, nodes_with_role
from fxquant.graph.structure.query_keys import query_keys
from passes.pipeline.contract import PassContext
from passes.prepare.balance_heads import BalanceHeads, balancing, spreading
from passes.prepare.rotate_residual import RotateResidual
from tests.assertions import assert_same_function
from tests.models import ARCHITECTURES, images, timm_model, traced, vit

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_computes_the_same_in_float64(name: str) -> None:
    model, size = ARCHITECTURES[name]()
    graph_module = traced(model.double(), images(2, size).double())
    before = copy.deepcopy(graph_module.state_dict())
    context = PassContext(images(4, size).double())
    count = len(nodes_with_role(graph_module, Role.QK))
    assert BalanceHeads().apply(graph_module, context) == count
    assert context.journal.pending["refused"] == {}
    assert_same_function(model, graph_module, images(3, size, seed=9))
    factors = context.journal.pending["balanced"]
    assert len(factors) == count
    assert all(0 < factor <= 1 for factor in factors.values())
    for key, value in graph_module.state_dict().items():
        if key.endswith("qkv.weight"):
            rows = len(value) // 3
            assert not torch.allclose(value[: 2 * rows], before[key][: 2 * rows])
            assert torch.equal(value[2 * rows :], before[key][2 * rows :]), "values stay"
        elif "qkv" not in key:
            assert torch.equal(value, before[key]), key


def test_given_model_stays_and_rotation_goes_with_it() -> None:
    model = vit().double()
    x = images(4).double()
    graph_module = traced(model, x)
    expected = model(x).detach()
    RotateResidual().apply(graph_module, PassContext(x))
    BalanceHeads().apply(graph_module, PassContext(x))
    assert torch.equal(model(x), expected)
    assert_same_function(model, graph_module, x)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True}, "linear layer"),
        ("eva02_tiny_patch14_224", {"patch_size": 16}, "linear layer"),
        ("swinv2_tiny_window8_256", {"window_size": 4, "depths": (1, 1), "num_heads": (2, 4)}, "linear layer"),
    ],
    ids=["norms of q and k", "rotary", "cosine"],
)
def test_what_stands_in_the_way_is_named(name: str, options: dict[str, object], reason: str) -> None:
    common = {**SMALL, **options}
    if "swin" in name:
        common |= {"embed_dim": 12, "img_size": 64}
        common.pop("depth")
    model = timm_model(name, **common)
    x = images(2, int(str(common["img_size"])))
    graph_module = traced(model, x)
    before, context = copy.deepcopy(graph_module.state_dict()), PassContext(x)
    assert BalanceHeads().apply(graph_module, context) == 0
    assert context.journal.pending["balanced"] == {}
    refused = context.journal.pending["refused"]
    assert len(refused) == len(nodes_with_role(graph_module, Role.QK)) > 0
    assert all(reason in text for text in refused.values()), refused
    assert all(torch.equal(value, before[key]) for key, value in graph_module.state_dict().items())


class OwnAttention(nn.Module):
    """Attention with something of its own between scores and softmax, or beside them; 5 tokens, 3 heads of 8."""

    def __init__(self, source: nn.Module, kind: str) -> None:
        super().__init__()
        self.qkv, self.proj, self.kind = source.qkv, source.proj, kind
        self.gate = nn.Parameter(torch.rand(5, 5) + 0.5)
        self.sink = nn.Parameter(torch.zeros(3, 1, 1))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        kind = self.kind
        q, k, v = self.qkv(x).reshape(x.shape[0], 5, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        k = q if kind == "one for both" else k
        if kind == "divided":
            q = torch.div(q, other=3.0)
        if kind == "rounded":
            q = torch.div(q, 0.1, rounding_mode="floor")
        if kind == "one query":
            q = q[:, :, :1]
        scores = q @ k.transpose(-2, -1)
        if kind == "gated":
            scores = scores * self.gate
        if kind == "biased":
            scores = scores + self.gate
        if kind in ("sink", "one query", "far sink"):
            scores = scores - 40 if kind == "far sink" else scores
            scores = torch.cat([scores, self.sink.expand(x.shape[0], 3, scores.shape[2], 1)], -1)
        if kind == "clamped":
            scores = scores.clamp(max=3.0)
        if kind == "over heads":
            scores = scores.permute(0, 2, 1, 3).reshape(x.shape[0], 5, 15)
        weights = scores.softmax(-1)
        if kind == "over heads":
            weights = weights.reshape(x.shape[0], 5, 3, 5).permute(0, 2, 1, 3)
        weights = weights * scores.sigmoid() if kind == "gated beside" else weights
        result = weights[..., :5] @ v
        if kind == "both ways":
            result = result + scores.transpose(-2, -1).softmax(-1) @ v
        if kind == "second product":
            result = result + (q @ self.norm(v).transpose(-2, -1)).softmax(-1) @ v
        result = result + q.relu() if kind == "leaky" else result
        result = self.proj(result.transpose(1, 2).reshape(x.shape[0], -1, 24))
        return (self.qkv.weight @ result.mT).mT[..., :24] if kind == "weight read" else result


REFUSED = {
    "leaky": "something else",
    "one for both": "several times",
    "rounded": "linear layer",
    "second product": "something else|linear layer",
    "weight read": "used 2 times",
}
WITHOUT_MEAN = ("plain", "biased", "divided")
WITH_MEAN = (
    "gated", "gated beside", "sink", "far sink", "one query", "clamped", "over heads", "both ways",
)  # fmt: skip


@pytest.mark.parametrize("kind", [*WITHOUT_MEAN, *WITH_MEAN, *REFUSED])
def test_computes_the_same_whatever_attention_does(kind: str) -> None:
    model = vit().double()
    for block in model.blocks:
        block.attn = OwnAttention(block.attn, kind).double()
    x = images(4).double()
    graph_module = traced(model, x)
    products, refused = query_keys(graph_module, x)
    if kind in REFUSED:
        assert not products
        assert all(re.search(REFUSED[kind], reason) for reason in refused.values()), refused
    else:
        assert [product.ignores_rows for product in products.values()] == [kind in WITHOUT_MEAN] * 2
    BalanceHeads().apply(graph_module, PassContext(x))
    assert_same_function(model, graph_module, x)
    keys: list[Tensor] = []
    graph_module.get_submodule("blocks.0.attn.qkv").register_forward_hook(lambda _, __, y: keys.append(y[..., 24:48]))
    graph_module(x)
    assert (float(keys[0].detach().mean((0, 1)).abs().max()) < 1e-9) == (kind in WITHOUT_MEAN)


def test_constant_keys_have_nothing_to_balance() -> None:
    graph_module = traced(vit().double(), images(2).double())
    weight = graph_module.get_submodule("blocks.0.attn.qkv").weight.detach()
    weight[24:48] = 0
    context, before = PassContext(images(4).double()), copy.deepcopy(graph_module)
    BalanceHeads().apply(graph_module, context)
    assert 0 <= context.journal.pending["balanced"]["blocks.0.attn.qk"] <= 1
    assert_same_function(before, graph_module, images(4))


@given(size=st.integers(1, 12), seed=st.integers(0, 1000), rank=st.integers(0, 12))
def test_balancing_equals_out_and_never_costs(size: int, seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def moment(rank: int) -> Tensor:
        draw = torch.randn(size, rank, dtype=torch.float64, generator=generator)
        return draw @ draw.T

    query, key = moment(size), moment(rank)
    matrix = balancing(query, key, 1e-3)
    inverse = torch.linalg.inv(matrix)
    eye = torch.eye(size, dtype=torch.float64)
    damped = [m + max(float(1e-3 * m.trace() / size), 1e-30) * eye for m in (query, key)]
    left, right = matrix.T @ damped[0] @ matrix, inverse @ damped[1] @ inverse.T
    assert float((left - right).abs().max()) <= 1e-6 * float(left.abs().max())
    after = float(left.trace() * right.trace())
    assert after <= float(damped[0].trace() * damped[1].trace()) * (1 + 1e-6)
    if not size & (size - 1):
        diagonal = left.diagonal()
        assert float(diagonal.max() - diagonal.min()) <= 1e-6 * float(diagonal.max())


@pytest.mark.parametrize("size", [1, 2, 3, 6, 8, 64])
def test_spreading_is_orthogonal(size: int) -> None:
    matrix = spreading(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dampening", [0.0, 1.0, -1.0])
def test_dampening_out_of_range(dampening: float) -> None:
    with pytest.raises(CalibrationError, match="above 0 and below 1"):
        BalanceHeads(dampening)
