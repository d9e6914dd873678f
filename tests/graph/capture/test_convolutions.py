"""Convolutions: two-dimensional ones are layers, whatever they pad with; so are transposed
ones whose kernels do not overlap; every other kind stays float."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.graph.annotation import annotation_of
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import ROLES_ASSIGNED, verify
from fxquant.graph.structure.residual_stream import residual_streams
from passes.pipeline.contract import PassContext
from passes.prepare.assign_roles import AssignRoles

IMAGES_BCHW = torch.rand(2, 3, 8, 8)


class Around(nn.Module):
    """A layer between an embedding and a head."""

    def __init__(self, layer: nn.Module, dimensions: int) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Conv2d(3, 4, 2, 2), layer, nn.Linear(4, 2)
        self.dimensions = dimensions

    def forward(self, x):
        x = self.embed(x)
        x = {1: lambda: x.flatten(2), 2: lambda: x, 3: lambda: x.unsqueeze(-1)}[self.dimensions]()
        return self.head(self.layer(x).flatten(2).mean(2))


@pytest.mark.parametrize(
    ("layer", "dimensions"),
    [
        (nn.ConvTranspose1d(4, 4, 2, 2), 1),
        (nn.ConvTranspose2d(4, 4, 3, 2), 2),
        (nn.ConvTranspose2d(4, 4, 2, 2, groups=2), 2),
        (nn.ConvTranspose2d(4, 4, 2, 2, padding=1), 2),
        (nn.ConvTranspose2d(4, 4, (2, 1), (2, 1)), 2),
        (nn.ConvTranspose3d(4, 4, 1), 3),
        (nn.Conv1d(4, 4, 3), 1),
        (nn.Conv3d(4, 4, 1), 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_other_convolutions_have_no_role(layer: nn.Module, dimensions: int) -> None:
    graph_module = trace(Around(layer, dimensions), IMAGES_BCHW)
    AssignRoles().apply(graph_module, PassContext())
    verify(graph_module, ROLES_ASSIGNED)
    roles = {
        str(node.target): annotation_of(node).role for node in graph_module.graph.nodes if node.op == "call_module"
    }
    assert roles.get("layer") is None
    assert None not in (roles["embed"], roles["head"])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", [1, 2, 4])
def test_transposed_convolutions_without_overlap_are_layers(side: int, bias: bool) -> None:
    model = Around(nn.ConvTranspose2d(4, 4, side, side, bias=bias), 2).eval()
    graph_module = trace(model, IMAGES_BCHW)
    AssignRoles().apply(graph_module, PassContext())
    (layer,) = (node for node in graph_module.graph.nodes if node.target == "layer")
    assert annotation_of(layer).role is not None
    assert annotation_of(layer).macs == 16 * 4 * 4 * side**2
    torch.testing.assert_close(graph_module(IMAGES_BCHW), model(IMAGES_BCHW))


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_padding_is_written_out(mode: str) -> None:
    model = Around(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode), 2).eval()
    graph_module = trace(model, IMAGES_BCHW)
    layer = graph_module.get_submodule("layer")
    assert (type(layer), layer.padding, layer.padding_mode) == (nn.Conv2d, (0, 0), "zeros")
    torch.testing.assert_close(graph_module(IMAGES_BCHW), model(IMAGES_BCHW))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_layer_that_reads_and_writes_the_residual_stream_is_seen_to_read_it(mode: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.embed(x)
            x = x + self.mix(x)
            return self.head(self.norm(x.flatten(2).transpose(1, 2)).mean(1))

    (stream,) = residual_streams(trace(Residual(), IMAGES_BCHW))
    assert any("mix" in refusal and "reads and writes the residual stream" in refusal for refusal in stream.refusals)
