"""AssignRoles: names, blocks and costs of a Vision Transformer, counted by hand."""

from __future__ import annotations

import pytest
import timm
import torch

from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import ROLES_ASSIGNED, verify
from fxquant.graph.printer import format_graph
from passes.pipeline.contract import PassContext
from passes.prepare.assign_roles import AssignRoles
from tests.assertions import assert_rewrites


def assigned(batch_size: int = 2):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, num_heads=2, depth=2, num_classes=5, qkv_bias=False
    )
    graph_module = trace(model, torch.rand(batch_size, 3, 8, 8))
    context = PassContext()
    return graph_module, AssignRoles().apply(graph_module, context), context


def test_layers_blocks_and_costs() -> None:
    graph_module, changed, context = assigned()
    verify(graph_module, ROLES_ASSIGNED)
    annotations = {annotation_of(node).layer: annotation_of(node) for node in nodes_with_role(graph_module)}
    assert changed == len(annotations) == 23
    block = ["norm1", "attn.qkv", "attn.qk", "attn.softmax", "attn.av", "attn.proj"]
    block += ["norm2", "mlp.fc1", "mlp.act", "mlp.fc2"]
    names = ["patch_embed.proj", *(f"blocks.{i}.{name}" for i in (0, 1) for name in block), "norm", "head"]
    assert list(annotations) == names
    assert [annotations[name].block for name in names] == [None, *[0] * 10, *[1] * 10, None, None]

    tokens, heads, width, channels = 5, 2, 6, 12
    qkv, scores = annotations["blocks.1.attn.qkv"], annotations["blocks.1.attn.qk"]
    assert qkv.macs == tokens * 36 * channels
    assert scores.macs == heads * tokens**2 * width
    assert annotations["patch_embed.proj"].macs == 4 * 12 * 3 * 4 * 4
    assert annotations["head"].macs == 60
    assert context.journal.pending == {"unmatched": []}


def test_costs_are_per_image() -> None:
    costs = [[annotation_of(n).macs for n in nodes_with_role(assigned(size)[0])] for size in (1, 2, 3)]
    assert costs[0] == costs[1] == costs[2]


@pytest.mark.quick
def test_idempotent() -> None:
    graph_module, changed, _ = assigned()
    before = [annotation_of(node) for node in graph_module.graph.nodes]
    assert assert_rewrites(graph_module, AssignRoles(), format_graph(graph_module)) == changed
    assert [annotation_of(node) for node in graph_module.graph.nodes] == before
