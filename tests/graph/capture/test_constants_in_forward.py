"""What a forward computes from sizes and constants alone becomes a constant of the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from fxquant.artefact.graph_json import graph_from_json, graph_to_json
from fxquant.errors import TraceError
from fxquant.graph.annotation import Role, annotation_of
from fxquant.graph.capture.tracing import trace
from tests.models import images, scrambled, traced

pytestmark = pytest.mark.quick

IMAGES = images(2, 4)


class Adds(nn.Module):
    """A linear layer, and a function of its output (B, 4)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(48, 4), function
        self.plain, self.inner, self.table = torch.arange(4.0)[None], Expands(), nn.Embedding(5, 4)

    def forward(self, image):
        return self.function(self, self.layer(image.flatten(1)))


class Expands(nn.Module):
    """Expands what it is given by the batch, as Hugging Face's Swin does with its mask."""

    def forward(self, x, mask):
        return x + mask.expand(x.shape[0], -1)


def assigned(m, x):
    mask = x.new_zeros((1, x.shape[1]))
    mask[:, 1:3] = 3
    mask[mask == 0] = x.shape[1]
    return x + mask


def batched(m, x):
    mask = torch.zeros((x.shape[0], 4))
    mask[:, 2] = -5.0
    return x + mask


def written_to_by_parts(m, x):
    mask = torch.zeros(x.shape[0], 4)
    mask[:, 1:3] = torch.ones(x.shape[0], 2)
    return x + mask


FUNCTIONS = {
    "assigned": assigned,
    "assigned, as long as the batch": batched,
    "an attribute expanded": lambda m, x: x + m.plain.expand(x.shape[0], -1),
    "made here, expanded in a module": lambda m, x: m.inner(x, torch.ones(1, 4)),
    "made here, by keyword": lambda m, x: m.inner(x=x, mask=torch.ones(1, 4)),
    "factories of the batch": lambda m, x: x + torch.full((x.shape[0], 4), 2.0) + x.new_ones(x.shape[0], 4),
    "zeros, sizes one by one": lambda m, x: torch.cat([x, torch.zeros(x.shape[0], 2) + 1], 1),
    "zeros, the batch in a product": lambda m, x: x + torch.ones(2 * x.shape[0], 4)[: x.shape[0]],
    "zeros, the batch last": lambda m, x: x + torch.ones(4, x.shape[0], dtype=torch.bool).T,
    "empty, filled": lambda m, x: x + torch.empty(x.shape[0], 4).fill_(2.0),
    "written to by parts": written_to_by_parts,
    "made here, expanded": lambda m, x: x + torch.arange(4.0)[None].expand(x.shape[0], -1),
    "made here, expanded by a tuple": lambda m, x: x + torch.arange(4.0)[None].expand((x.shape[0], 4)),
    "made here, repeated": lambda m, x: x + torch.arange(4.0)[None].repeat(x.shape[0], 1),
    "made here, a view": lambda m, x: x + torch.ones(4).view(1, 4).expand(x.size(0), 4).view(x.size(0), -1),
    "made here, a slice": lambda m, x: x + torch.arange(9.0)[: x.shape[0], None],
    "made here, divided": lambda m, x: x + torch.ones(4) / x.shape[0],
    "factories of a tensor made here": lambda m, x: x + torch.ones(2).new_zeros(x.shape[0], 4),
    "broadcast_to": lambda m, x: x + torch.broadcast_to(torch.arange(4.0), (len(x[0]) * 0 + x.shape[0], 4)),
    "eye of the batch": lambda m, x: torch.eye(x.shape[0]) @ x,
    "linspace of the batch": lambda m, x: x + torch.linspace(0, 1, x.shape[0])[:, None],
    "arange of the batch": lambda m, x: x[torch.arange(x.shape[0])],
    "a maximum by name": lambda m, x: x.max(1).values[:, None] + x.view(-1, 4, 1).min(2).indices,
    "a maximum unpacked": lambda m, x: sum(torch.min(x, 1))[:, None] + x.topk(2)[0][:, :1],
    "a constant's maximum": lambda m, x: x * m.plain.max(1).values,
    "rows of a table": lambda m, x: x + m.table((x > 0).long().sum(1)) + m.table(torch.full((x.shape[0],), 3)),
    "rows of a table, the same for all": lambda m, x: x + m.table(torch.tensor([2])),
    "a constant mask and another": lambda m, x: x * ((m.plain > 1) & (x > 0) | (m.plain > 2) ^ (x < 0)),
    "grid": lambda m, x: x + torch.stack(torch.meshgrid(*2 * [torch.arange(2)], indexing="ij"))[0].flatten(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_computes_what_the_model_does_also_from_a_file(name) -> None:
    graph_module = trace(Adds(FUNCTIONS[name]).eval(), IMAGES)
    loaded = graph_from_json(*graph_to_json(graph_module))
    assert torch.equal(loaded(images(5, 4)), graph_module(images(5, 4)))


def test_a_loop_over_the_images_of_a_batch_is_refused() -> None:
    with pytest.raises(TraceError, match="how many images there are"):
        trace(Adds(lambda m, x: torch.stack([x[i] for i in range(x.shape[0])])).eval(), IMAGES)


def test_what_depends_on_sizes_alone_leaves_no_operation() -> None:
    graph_module = trace(Adds(assigned).eval(), IMAGES)
    assert [node.op for node in graph_module.graph.nodes if node.op == "get_attr"] == ["get_attr"]
    assert not any("zeros" in str(node.target) or "scatter" in str(node.target) for node in graph_module.graph.nodes)


@pytest.mark.parametrize("second", [False, True])
def test_torchvisions_swin_has_every_role(second) -> None:
    version = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if second else {}
    model = SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=7, **version)
    graph_module = traced(scrambled(model), images(2, 28))
    found = [annotation_of(node).role for node in graph_module.graph.nodes]
    for role in (Role.QKV, Role.QK, Role.SOFTMAX, Role.AV, Role.PROJ, Role.FC1, Role.FC2):
        assert found.count(role) == 4
