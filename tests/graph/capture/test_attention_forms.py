"""Attention and products of two tensors in every spelling: matmul, nn.Softmax and nn.Linear, with the same result."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

from fxquant.graph.annotation import Role, annotation_of
from fxquant.graph.capture.contractions import einsum, tensordot
from fxquant.graph.capture.tracing import trace
from passes.pipeline.contract import PassContext
from passes.prepare.assign_roles import AssignRoles

IMAGES_BCHW = torch.rand(2, 3, 8, 8)
TOKENS, HEADS, SIZE = 4, 2, 4


class Attention(nn.Module):
    """One attention of four tokens; `attend` is given q, k, v (B, H, N, D) and returns the same shape."""

    def __init__(self, attend, kv_heads: int = HEADS) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.embed, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 2)
        self.q, self.k, self.v = (nn.Linear(width, n * SIZE) for n in (HEADS, kv_heads, kv_heads))
        self.proj, self.attend = nn.Linear(width, width), attend
        self.register_buffer("bias", torch.rand(HEADS, TOKENS, TOKENS))
        self.register_buffer("seen", torch.ones(TOKENS, TOKENS).tril(1).bool())

    def forward(self, image):
        x = self.embed(image).flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.head(self.proj(self.attend(self, q, k, v).transpose(1, 2).flatten(2)).mean(1))


def sdpa(**options):
    def attend(m, q, k, v):
        chosen = {name: value(m, q) if callable(value) else value for name, value in options.items()}
        return functional.scaled_dot_product_attention(query=q, value=v, key=k, **chosen)

    return attend


def by_einsum(scores: str, values: str, swapped: bool = False):
    def attend(m, q, k, v):
        s = torch.einsum(scores, k, q) if swapped else torch.einsum(scores, q, k)
        return torch.einsum(values, s.softmax(-1), v)

    return attend


def half_then_float(m, q, k, v):
    return (q @ k.mT).softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def by_function(m, q, k, v):
    return torch.matmul(other=v, input=functional.softmax(q @ k.transpose(3, 2), 3, _stacklevel=5))


def by_baddbmm(m, q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(m.bias[0], q, k.transpose(1, 2), beta=0.5, alpha=0.3)
    return torch.bmm(torch.special.softmax(scores, 2), v).unflatten(0, (-1, HEADS))


def by_empty_baddbmm(m, q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(q.new_empty(q.shape[0], TOKENS, TOKENS), q, k.transpose(1, 2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(2), v).unflatten(0, (-1, HEADS))


SPELLINGS = {
    "sdpa by keyword": sdpa(),
    "sdpa with scale": sdpa(scale=0.3),
    "sdpa causal": sdpa(is_causal=True),
    "sdpa bool mask": sdpa(attn_mask=lambda m, q: m.seen),
    "sdpa bias": sdpa(attn_mask=lambda m, q: m.bias),
    "sdpa bool mask from activations": sdpa(
        attn_mask=lambda m, q: (q.mean((1, 3))[:, None, None] < 9).expand(-1, 1, 4, -1)
    ),
    "sdpa mask from activations": sdpa(attn_mask=lambda m, q: q.mean((1, 3))[:, None, None]),
    "einsum": by_einsum("bhid,bhjd->bhij", "bhij,bhjd->bhid"),
    "einsum with ellipsis": by_einsum("... i d, ... j d -> ... i j", "...ij,...jd->...id"),
    "einsum swapped": by_einsum("bhjd,bhid->bhij", "bhij,bhjd->bhid", swapped=True),
    "einsum to another order": by_einsum("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"),
    "softmax in float32": half_then_float,
    "functions": by_function,
    "baddbmm": by_baddbmm,
    "baddbmm of nothing": by_empty_baddbmm,
}


def roles_of(graph_module) -> Counter[Role]:
    AssignRoles().apply(graph_module, PassContext())
    return Counter(annotation_of(n).role for n in graph_module.graph.nodes if annotation_of(n).role is not None)


@pytest.mark.parametrize("name", SPELLINGS)
def test_attention_has_its_roles_in_every_spelling(name: str) -> None:
    model = Attention(SPELLINGS[name]).eval()
    graph_module = trace(model, IMAGES_BCHW)
    roles = roles_of(graph_module)
    wanted = {Role.QKV: 3, Role.QK: 1, Role.SOFTMAX: 1, Role.AV: 1, Role.PROJ: 1}
    assert {role: roles[role] for role in wanted} == wanted
    called = {node.target for node in graph_module.graph.nodes}
    assert not called & {functional.scaled_dot_product_attention, torch.einsum, torch.baddbmm, torch.bmm}
    softmax = next(m for m in graph_module.modules() if isinstance(m, nn.Softmax))
    assert softmax.dim == -1
    torch.testing.assert_close(graph_module(IMAGES_BCHW), model(IMAGES_BCHW))


def test_grouped_queries_are_written_out() -> None:
    model = Attention(sdpa(enable_gqa=True), kv_heads=1).eval()
    graph_module = trace(model, IMAGES_BCHW)
    torch.testing.assert_close(graph_module(IMAGES_BCHW), model(IMAGES_BCHW))
    assert roles_of(graph_module)[Role.QK] == 1


def test_masks_stay_finite() -> None:
    graph_module = trace(Attention(sdpa(is_causal=True)), IMAGES_BCHW)
    masks = [buffer for buffer in graph_module.buffers() if buffer.shape == (TOKENS, TOKENS)]
    assert len(masks) == 1
    assert torch.isfinite(masks[0] * math.log2(math.e) + masks[0]).all()


EQUATIONS = [
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)), ("bij,bkj->bki", (2, 3, 4), (2, 5, 4)), ("ij,jk", (2, 3), (3, 4)),
    ("ba,cb", (2, 3), (4, 2)), ("bhwc,hkc->bhwk", (2, 3, 4, 5), (3, 6, 5)),
    ("bijk,bjkl->bil", (2, 3, 4, 5), (2, 4, 5, 6)),
    ("bi,bi->b", (2, 3), (2, 3)), ("...c,c->...", (2, 3, 4), (4,)), ("bnc,bmc->nbm", (2, 3, 4), (2, 5, 4)),
    ("bxyc,bzwc->bxyzw", (2, 3, 4, 5), (2, 2, 3, 5)), ("...ij,...jk->...ik", (3, 4), (2, 4, 5)),
    ("i,i->", (3,), (3,)), ("bi...,bi->b...", (2, 3, 4), (2, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("equation", "left", "right"), EQUATIONS)
@pytest.mark.parametrize("constant", ["none", "left", "right"])
def test_einsum_of_two_is_a_matrix_product(equation: str, left, right, constant: str) -> None:
    a, b = torch.rand(left), torch.rand(right)
    known = {"none": None, "left": a, "right": b}[constant]
    found = einsum(lambda x: x is known, equation, a, b)
    assert found is not NotImplemented
    torch.testing.assert_close(found, torch.einsum(equation, a, b))


@pytest.mark.parametrize("equation", ["ii,ij->j", "i,j->ij", "bi,bj->ij", "bic,bc->bic"])
def test_other_equations_are_left_alone(equation: str) -> None:
    letters = equation.partition("->")[0].split(",")
    a, b = (torch.rand([2] * len(term)) for term in letters)
    found = einsum(lambda x: False, equation, a, b)
    if found is not NotImplemented:
        torch.testing.assert_close(found, torch.einsum(equation, a, b))


def test_tensordot_is_a_matrix_product() -> None:
    a, b = torch.rand(2, 3, 4), torch.rand(4, 3, 5)
    for dims in (1, ([1, 2], [1, 0]), ([-1], [0])):
        torch.testing.assert_close(tensordot(lambda x: False, a, b, dims), torch.tensordot(a, b, dims))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: torch.einsum("bnc,dc->bnd", x, m.weight),
        lambda m, x: torch.einsum("cd,bnc->bnd", m.weight, x),
        lambda m, x: torch.einsum("bnc,hec->bhne", x, m.weight.view(2, 4, 8)).transpose(1, 2).flatten(2),
        lambda m, x: x @ m.weight,
        lambda m, x: torch.matmul(x, m.weight.t()),
        lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight).view(x.shape),
        lambda m, x: torch.tensordot(x, m.weight, 1),
        lambda m, x: torch.inner(x, m.weight),
    ],
)
def test_products_with_a_constant_matrix_are_linear_layers(body) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 2)
            self.weight, self.bias = nn.Parameter(torch.rand(8, 8)), nn.Parameter(torch.rand(8))

        def forward(self, image):
            return self.head(body(self, self.embed(image).flatten(2).transpose(1, 2)).mean(1))

    model = Product().eval()
    graph_module = trace(model, IMAGES_BCHW)
    assert roles_of(graph_module)[Role.LINEAR] == 1
    torch.testing.assert_close(graph_module(IMAGES_BCHW), model(IMAGES_BCHW))
