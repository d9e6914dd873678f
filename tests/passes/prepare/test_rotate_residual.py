"""RotateResidual: the model computes the same, its channels look alike, and what cannot be rotated is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxquant.graph.capture.tracing import trace
from fxquant.graph.structure.residual_stream import residual_streams
from passes.pipeline.contract import PassContext
from passes.prepare.rotate_residual import RotateResidual, mean_keeping_rotation
from tests.assertions import assert_same_function
from tests.models import ARCHITECTURES, images, scrambled, timm_model, vit

BEIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}
ROTATED = {
    **{name: build for name, build in ARCHITECTURES.items() if "swin" not in name},
    "beit": lambda: (timm_model("beit_base_patch16_224", **BEIT), 32),
    "registers": lambda: (timm_model("vit_small_patch14_reg4_dinov2", **{**BEIT, "patch_size": 16}), 32),
}


@pytest.mark.parametrize("width", [2, 3, 24, 97])
def test_the_rotation_is_orthogonal_and_keeps_the_mean(width: int) -> None:
    q = mean_keeping_rotation(width, torch.Generator().manual_seed(3))
    assert torch.allclose(q @ q.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(q @ torch.ones(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64))
    assert torch.equal(q, mean_keeping_rotation(width, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("name", ROTATED)
def test_computes_the_same_in_float64(name: str) -> None:
    model, size = ROTATED[name]()
    model = model.double()
    graph_module = trace(model, images(2, size).double())
    before = copy.deepcopy(graph_module.state_dict())
    context = PassContext(images(2, size).double())
    assert RotateResidual().apply(graph_module, context) >= 8
    assert context.journal.pending["refused"] == {}
    assert_same_function(model, graph_module, images(3, size, seed=9))
    after = graph_module.state_dict()
    for part in ("patch_embed.proj.weight", "blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.bias", "head.weight"):
        assert not torch.allclose(before[part], after[part]), part
    gains = [value for key, value in after.items() if key.endswith("norm1.weight")]
    assert gains
    assert all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)
    assert not any(name in graph_module.code for name in (".gamma", "gamma_1"))


def test_swin_is_rotated_where_it_can_be() -> None:
    model, size = ARCHITECTURES["swin that pads"]()
    x = images(2, size).double()
    graph_module = trace(model.double(), x)
    context = PassContext(x)
    RotateResidual().apply(graph_module, context)
    assert_same_function(model, graph_module, x)
    assert "patch_embed_norm" in context.journal.pending["refused"]
    assert all(context.journal.pending["refused"].values())


def test_a_stream_read_by_something_else_is_refused() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = vit()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.inner.blocks[0](self.inner.patch_embed(x))
            return self.inner.head(self.inner.norm(tokens).mean(1)) + tokens.relu().sum((1, 2))[:, None]

    graph_module = trace(Leaky().eval(), images(2))
    stream = residual_streams(graph_module)[0]
    assert any("relu" in reason for reason in stream.refusals)
    before = copy.deepcopy(graph_module.state_dict())
    assert RotateResidual().apply(graph_module, PassContext(images(2))) == 0
    assert all(torch.equal(value, before[key]) for key, value in graph_module.state_dict().items())


class DepthwiseBlocks(nn.Module):
    """Two blocks as ConvNeXt has them: a depthwise convolution writes what the norm and the layers after it read."""

    def __init__(self, groups: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.depthwise = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=groups) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for depthwise, norm, layers in zip(self.depthwise, self.norms, self.layers, strict=True):
            x = x + layers(norm(depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.head(self.norm(x.mean((2, 3))))


class WithNeck(nn.Module):
    """A ViT's blocks without their last norm, and a neck that reads the stream, as in SAM's encoder."""

    def __init__(self, neck: nn.Module, mixes: bool = False) -> None:
        super().__init__()
        self.inner, self.neck, self.mixes = vit(), neck, mixes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.inner.blocks(self.inner.patch_embed(x))
        if isinstance(self.neck, nn.Linear):
            return self.neck(tokens)
        if self.mixes:
            return self.neck(tokens.reshape(x.shape[0], tokens.shape[2], 2, 2))
        return self.neck(tokens.transpose(1, 2).reshape(x.shape[0], tokens.shape[2], 2, 2))


@pytest.mark.parametrize("neck", [nn.Linear(24, 5), nn.Conv2d(24, 5, 1, bias=False), nn.Conv2d(24, 5, 3, padding=1)])
def test_a_layer_that_reads_the_stream_without_a_norm_is_rotated_too(neck: nn.Module) -> None:
    model = scrambled(WithNeck(neck)).double()
    x = images(2).double()
    graph_module, context = trace(model, x), PassContext(x)
    before = graph_module.get_submodule("neck").weight.detach().clone()  # type: ignore[union-attr,operator]
    RotateResidual().apply(graph_module, context)
    assert context.journal.pending["refused"] == {}
    assert not torch.allclose(before, graph_module.get_submodule("neck").weight)  # type: ignore[arg-type]
    assert_same_function(model, graph_module, images(3, seed=9).double())


def test_a_reader_that_mixes_channels_with_places_is_refused() -> None:
    model = scrambled(WithNeck(nn.Conv2d(24, 5, 1), mixes=True)).double()
    x = images(2).double()
    graph_module, context = trace(model, x), PassContext(x)
    assert RotateResidual().apply(graph_module, context) == 0
    assert list(context.journal.pending["refused"].values()) == [
        "channels of the residual stream are mixed before neck"
    ]


@pytest.mark.parametrize("groups", [2, 8])
def test_what_grouped_convolutions_write_is_left_alone(groups: int) -> None:
    x = images(2, 16).double()
    model, context = scrambled(DepthwiseBlocks(groups)).double(), PassContext(x)
    graph_module = trace(model, x)
    RotateResidual().apply(graph_module, context)
    assert_same_function(model, graph_module, x)
    assert f"in {groups} groups of channels" in context.journal.pending["refused"]["norms_0"]


def test_an_outlier_channel_is_spread_out() -> None:
    """Largest over median channel magnitude after LayerNorm: what one scale has to cover."""
    model, x = vit(), images(4)
    with torch.no_grad():
        model.get_parameter("pos_embed")[..., 5] += 1000

    def spread(graph_module: torch.fx.GraphModule) -> float:
        seen: list[torch.Tensor] = []
        hook = graph_module.get_submodule("blocks.0.norm1").register_forward_hook(lambda _, __, y: seen.append(y))
        graph_module(x)
        hook.remove()
        magnitude = seen[0].flatten(0, -2).abs().amax(0)
        return float(magnitude.max() / magnitude.median())

    graph_module = trace(model, x)
    before = spread(graph_module)
    RotateResidual().apply(graph_module, PassContext(x))
    assert before > 5
    assert spread(graph_module) < 0.5 * before


def test_the_seed_decides() -> None:
    weights = []
    for seed in (0, 0, 1):
        graph_module = trace(vit(), images(2))
        RotateResidual().apply(graph_module, PassContext(images(2), seed=seed))
        weights.append(graph_module.get_submodule("head").weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])
