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
        self.body = body

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
