"""Real architectures: each traces into a graph that computes the same, and has the roles it should have."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch import nn

from fxquant.errors import TraceError
from fxquant.graph.annotation import annotation_of
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import ROLES_ASSIGNED, TRACED, verify
from fxquant.graph.notes import COVERAGE
from passes.pipeline.contract import PassContext
from passes.prepare.assign_roles import AssignRoles
from tests.conformance.architectures import BLOCK_ROLES, KNOWN_UNTRACEABLE, OTHERS, TRANSFORMERS, Architecture


def traced(architecture: Architecture) -> torch.fx.GraphModule:
    graph_module = trace(architecture.built(), torch.rand(2, 3, architecture.size, architecture.size))
    AssignRoles().apply(graph_module, PassContext())
    return graph_module


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(TRANSFORMERS[0], marks=pytest.mark.quick), *TRANSFORMERS[1:], *OTHERS],
    ids=lambda a: a.name,
)
def test_traces_exactly_and_every_layer_has_a_role(architecture: Architecture) -> None:
    graph_module = traced(architecture)  # trace itself compares with the eager model at two batch sizes
    for fact in (TRACED, ROLES_ASSIGNED):
        verify(graph_module, fact)
    modules = [m for m in graph_module.modules() if not list(m.children()) and type(m) is not nn.Module]
    assert all(type(module).__module__.startswith("torch.nn") for module in modules)
    assert COVERAGE.of(graph_module) == 1.0

    if architecture.blocks is None:
        return
    roles = Counter(str(annotation_of(node).role) for node in graph_module.graph.nodes)
    expected = dict.fromkeys(BLOCK_ROLES, architecture.blocks) | {"head": 1, "reduction": 0} | architecture.counts
    assert {role: roles[role] for role in expected} == expected
    blocks = {annotation_of(node).block for node in graph_module.graph.nodes} - {None}
    assert blocks == set(range(architecture.blocks))
    per_block = Counter((annotation_of(n).block, str(annotation_of(n).role)) for n in graph_module.graph.nodes)
    for role in BLOCK_ROLES:
        if not expected[role] % architecture.blocks:
            assert len({per_block[block, role] for block in blocks}) == 1, f"{role} is uneven over blocks"


@pytest.mark.parametrize("name", KNOWN_UNTRACEABLE)
def test_untraceable_architectures_say_so(name: str) -> None:
    size, options, _reason = KNOWN_UNTRACEABLE[name]
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    with pytest.raises(TraceError):
        trace(model, torch.rand(1, 3, size, size))
