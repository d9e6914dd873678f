"""Patterns hold by structure, and near-misses fail for the stated reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.errors import VerificationError
from fxquant.graph.annotation import Role, annotate, annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import ROLES_ASSIGNED, TRACED, declare, verify
from fxquant.graph.printer import describe
from fxquant.graph.structure.roles import find_roles
from tests.operands import operands

pytestmark = pytest.mark.quick

IMAGES_BCHW = torch.rand(1, 3, 8, 8)


class Body(nn.Module):
    """Linears a to d around one function, between a patch embedding and a head."""

    def __init__(self, body) -> None:
        super().__init__()
        self.embed, self.head, self.norm = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 2), nn.LayerNorm(6)
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.gather = nn.Linear(12, 6)
        self.heads, self.heads_1x1 = nn.Linear(2, 2), nn.Conv2d(2, 2, 1)
        self.body = body

    def mix(self, mixing, scores_bhnn):
        """Every head's numbers as sums over all heads', spelled in one of several ways."""
        if mixing == "linear":
            return self.heads(scores_bhnn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if mixing == "convolution":
            return self.heads_1x1(scores_bhnn)
        if mixing == "einsum":
            return torch.einsum("bhij,hg->bgij", scores_bhnn, self.heads.weight)
        return torch.einsum("gh,bhij->bgij", self.heads.weight, scores_bhnn)

    def forward(self, image):
        tokens_bnc = self.embed(image).flatten(2).transpose(1, 2)
        return self.head(self.body(self, tokens_bnc).mean(1))


def found(body):
    roles = find_roles(trace(Body(body), IMAGES_BCHW))
    return roles, {failure.node: failure.reason for failure in roles.failures}


def test_attention_with_separate_linears() -> None:
    roles, failures = found(lambda m, x: m.d((m.a(x) @ m.b(x).mT).softmax(-1) @ m.c(x)))
    assert [roles.role[name] for name in "abcd"] == [Role.QKV, Role.QKV, Role.QKV, Role.PROJ]
    assert roles.role["embed"] is Role.PATCH_EMBED
    assert roles.role["head"] is Role.HEAD
    assert not failures


def test_gated_mlp_has_two_first_linears() -> None:
    roles, _ = found(lambda m, x: m.d(nn.functional.silu(m.a(x)) * m.b(x)))
    assert [roles.role[name] for name in "abd"] == [Role.FC1, Role.FC1, Role.FC2]


@pytest.mark.parametrize("mixing", ["linear", "convolution", "einsum", "einsum, weight first"])
@pytest.mark.parametrize("place", ["before the softmax", "after it"])
def test_layers_that_mix_heads_belong_to_attention(mixing: str, place: str) -> None:
    def body(m, x):
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (m.a, m.b, m.c))
        scores = q @ k.mT
        scores = scores if place == "after it" else m.mix(mixing, scores)
        probabilities = scores.softmax(-1)
        probabilities = m.mix(mixing, probabilities) if place == "after it" else probabilities
        return m.d((probabilities @ v).transpose(1, 2).flatten(2))

    roles, failures = found(body)
    assert [roles.role[name] for name in "abcd"] == [Role.QKV, Role.QKV, Role.QKV, Role.PROJ]
    assert sorted(roles.role.values()).count(Role.LINEAR) == 1
    assert [role for role in (Role.QK, Role.SOFTMAX, Role.AV) if role in roles.role.values()] == [
        Role.QK,
        Role.SOFTMAX,
        Role.AV,
    ]
    assert not failures


def test_merging_neighbours_is_a_reduction() -> None:
    roles, _ = found(lambda m, x: m.gather(m.a(x).reshape(x.shape[0], 2, 12)))
    assert roles.role["gather"] is Role.REDUCTION
    assert roles.role["a"] is Role.LINEAR


@pytest.mark.parametrize(
    ("body", "node", "reason"),
    [
        (lambda m, x: m.a(x).softmax(-1), "softmax_1", "softmax feeds no matmul"),
        (lambda m, x: m.b(nn.functional.gelu(x + m.a(x))), "act", "no linear before the activation"),
        (lambda m, x: m.d(m.a(x) @ m.b(x).mT @ m.c(x)), "matmul_2", "neither before nor after a softmax"),
        (lambda m, x: x + m.norm(x), "norm", "goes to 'add', not to a linear"),
        (
            lambda m, x: (lambda n: m.d((n @ n.mT).softmax(-1) @ n) + m.b(n))(m.norm(x)),
            "matmul_2",
            "no linear before the operands",
        ),
        (
            lambda m, x: m.d((m.d.weight[:4, :4] @ (m.a(x) @ m.b(x).mT).softmax(-1)) @ m.c(x)),
            "softmax_1",
            "'matmul_4' multiplies its output from the left by a constant",
        ),
        (lambda m, x: m.a(x), "a", "neither in attention nor in an MLP"),
    ],
)
def test_near_misses_say_why(body, node: str, reason: str) -> None:
    _, failures = found(body)
    assert reason in failures.get(node, failures)


def test_verifier_names_the_node() -> None:
    graph_module = trace(Body(lambda m, x: m.a(x)), IMAGES_BCHW)
    verify(graph_module, TRACED)
    with pytest.raises(VerificationError, match="run the pass that provides it"):
        verify(graph_module, ROLES_ASSIGNED)
    declare(graph_module, frozenset({ROLES_ASSIGNED}))
    with pytest.raises(VerificationError, match=r"%embed = Conv2d.*a layer has no role"):
        verify(graph_module, ROLES_ASSIGNED)


@pytest.mark.parametrize(
    ("bits", "text"),
    [((None, None), "head"), ((4, None), "head[w4]"), ((None, 8), "head[a8]"), ((4, 8), "head[w4a8]")],
)
def test_description_shows_bits(bits: tuple[int | None, ...], text: str) -> None:
    graph_module = trace(Body(lambda m, x: m.a(x)), IMAGES_BCHW)
    node = next(n for n in graph_module.graph.nodes if n.name == "head")
    annotate(node, role=Role.HEAD, operands=operands(*bits))
    assert describe(node) == f"%head = {text}(%mean)"
    assert nodes_with_role(graph_module, Role.HEAD) == [node]
    assert annotation_of(node).role is Role.HEAD
