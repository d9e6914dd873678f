"""FoldSqb: the model computes the same, each channel's range is shared with the weights; what must not be is left."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import CalibrationError
from fxquant.graph.capture.tracing import trace
from fxquant.graph.structure.channel_paths import channel_paths
from passes.pipeline.contract import PassContext
from passes.prepare.fold_sqb import FoldSqb
from tests.assertions import assert_same_function
from tests.models import ARCHITECTURES, SWIN, VIT, images, timm_model, vit

SWITCHES = {
    "SQ-b": FoldSqb(),
    "SQ": FoldSqb(mu="none"),
    "OS+": FoldSqb(eps="outlier-suppression+", mu="midrange"),
    "only mu": FoldSqb(eps="none"),
    "none": FoldSqb(eps="none", mu="none"),
}


def fold(graph_module: GraphModule, x: Tensor, switches: FoldSqb = FoldSqb()) -> dict[str, Any]:
    """Fold in place; returns the pass's notes."""
    context = PassContext(x, batch_size=4)
    switches.apply(graph_module, context)
    context.journal.close_step("fold", 0, 0.0, 0.0)
    graph_module.graph.lint()
    return context.journal.entries[0].notes


def parameters_of(graph_module: GraphModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in graph_module.state_dict().items()}


@functools.cache
def in_float64(architecture: str) -> tuple[GraphModule, int]:
    model, size = ARCHITECTURES[architecture]()
    return trace(model.double(), images(2, size).double()), size


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_computes_the_same_in_float64(architecture: str, switch: str) -> None:
    original, size = in_float64(architecture)
    graph_module = copy.deepcopy(original)
    before = parameters_of(graph_module)
    notes = fold(graph_module, images(4, size).double(), SWITCHES[switch])
    assert_same_function(original, graph_module, images(3, size, seed=9))
    after = parameters_of(graph_module)
    assert all(tensor.dtype == torch.float64 for tensor in after.values() if tensor.is_floating_point())
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    folds_something = switch != "none"
    expected_layers = ("qkv", "fc1", "head")
    assert len(notes["folded"]) >= 5
    for layer in expected_layers:
        assert any(layer in name and name.endswith("weight") for name in changed) == (
            folds_something and switch != "only mu"
        )
    assert any("norm1" in name for name in changed) == (
        folds_something and not (switch == "only mu" and "pads" in architecture)
    )


def test_what_is_folded_in_a_vit() -> None:
    graph_module = trace(vit(), images(2))
    notes = fold(graph_module, images())
    assert notes["folded"] == [f"blocks_{b}_norm{n}" for b in (0, 1) for n in (1, 2)] + ["norm"]
    assert notes["refused"] == {}


def test_swin_reduction_without_bias_gets_one() -> None:
    model = timm_model("swin_tiny_patch4_window7_224", **SWIN)
    graph_module = trace(model, images(2, 56))
    name = next(name for name, _ in graph_module.named_modules() if name.endswith("reduction"))
    assert graph_module.get_submodule(name).bias is None
    notes = fold(graph_module, images(4, 56))
    assert graph_module.get_submodule(name).bias is not None
    assert "patch_embed_norm" in " ".join(notes["refused"]), "read by the residual stream"


def test_padding_is_seen_and_the_shift_left_out() -> None:
    model = timm_model("swin_tiny_patch4_window7_224", **SWIN)
    x = images(4, 56)
    graph_module = trace(model, x[:2])
    padded = {norm.name for norm, path in channel_paths(graph_module, x).items() if path.padded}
    assert padded == {f"layers_{s}_blocks_{b}_norm1" for s in (0, 1) for b in (0, 1)}
    before = parameters_of(graph_module)
    fold(graph_module, x, FoldSqb(eps="none"))
    after = parameters_of(graph_module)
    assert torch.equal(before["layers.0.blocks.0.norm1.bias"], after["layers.0.blocks.0.norm1.bias"])
    assert not torch.equal(before["layers.0.blocks.0.norm2.bias"], after["layers.0.blocks.0.norm2.bias"])


def test_sqb_does_what_equation_4_says() -> None:
    x = images(8)
    graph_module = trace(vit(), x[:2])
    norm, fc1 = graph_module.get_submodule("blocks.0.norm2"), graph_module.get_submodule("blocks.0.mlp.fc1")
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output.flatten(0, 1)))
    graph_module(x)
    y, weight = torch.cat(seen).double(), fc1.weight.detach().double()
    fold(graph_module, x)  # the earlier norms are folded too, which leaves this norm's input as it was
    seen.clear()
    graph_module(x)
    handle.remove()
    mu = y.mean(0)
    eps = ((y - mu).abs().amax(0) / weight.abs().amax(0)).sqrt()
    folded = torch.cat(seen).double()
    assert torch.allclose(folded, (y - mu) / eps, atol=1e-4)
    assert torch.allclose(fc1.weight.double(), weight * eps, rtol=1e-4)
    assert float(folded.mean(0).abs().max()) < 1e-4
    assert torch.allclose(folded.abs().amax(0), fc1.weight.double().abs().amax(0), rtol=1e-3), "difficulty is shared"


def test_midrange_centres_the_range() -> None:
    x = images(8)
    graph_module = trace(vit(), x[:2])
    fold(graph_module, x, SWITCHES["OS+"])
    seen: list[Tensor] = []
    graph_module.get_submodule("blocks.0.norm1").register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.flatten(0, 1))
    )
    graph_module(x)
    y = seen[0]
    assert torch.allclose(y.amax(0), -y.amin(0), atol=1e-4)


class TestHardChannels:
    def test_constant_and_unread_channels(self) -> None:
        model = vit().double()
        with torch.no_grad():
            model.blocks[0].norm1.weight[3] = 0  # constant
            model.blocks[0].norm1.weight[4] = 0
            model.blocks[0].norm1.bias[4] = 0  # constant zero
            model.blocks[0].attn.qkv.weight[:, 5] = 0  # nobody reads it
            model.blocks[0].norm2.weight[6] = 1e9  # beyond the range of eps
        x = images().double()
        for switches in SWITCHES.values():
            graph_module = trace(model, x[:2])
            fold(graph_module, x, switches)
            assert all(bool(torch.isfinite(value).all()) for value in graph_module.state_dict().values())
            assert_same_function(model, graph_module, x, 1e-8)

    @pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}])
    def test_norms_without_parameters_get_them(self, options: dict[str, bool]) -> None:
        model = vit().double()
        model.blocks[0].norm1 = nn.LayerNorm(24, **options).double()
        x = images().double()
        graph_module = trace(model.eval(), x[:2])
        notes = fold(graph_module, x)
        assert "blocks_0_norm1" in notes["folded"]
        assert_same_function(model, graph_module, x)


class TestRefusals:
    def test_post_norm(self) -> None:
        """Swin-V2 normalizes after the branch: the norm's output joins the residual stream."""
        options = {**SWIN, "img_size": 64}
        model = timm_model("swinv2_tiny_window8_256", **options).double()
        x = images(4, 64).double()
        graph_module = trace(model, x[:2])
        notes = fold(graph_module, x)
        assert_same_function(model, graph_module, x)
        refused = {name: reason for name, reason in notes["refused"].items() if "blocks" in name}
        assert len(refused) == 8
        assert all("add" in reason and "is not a linear layer" in reason for reason in refused.values())
        assert notes["folded"], "the final norm can be folded"

    def test_norm_read_by_the_residual_stream(self) -> None:
        class ReadsTwice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Conv2d(3, 8, 4, 4)
                self.norm, self.layer, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                y = self.norm(self.embed(x).flatten(2).transpose(1, 2))
                return self.head((self.layer(y) + y).mean(1))

        assert_refused(ReadsTwice(), "norm", "add (call_function) reads norm and is not a linear layer")

    def test_tensors_of_a_norm_or_layer_are_read_elsewhere(self) -> None:
        class Shared(nn.Module):
            def __init__(self, owner: str) -> None:
                super().__init__()
                self.embed, self.owner = nn.Conv2d(3, 8, 4, 4), owner
                self.norm, self.layer, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                y = self.layer(self.norm(self.embed(x).flatten(2).transpose(1, 2)))
                return self.head((y.relu() * getattr(self, self.owner).bias).mean(1))

        for owner in ("norm", "layer"):
            assert_refused(Shared(owner), "norm", f"{owner} is used 2 times")

    def test_channels_mixed_on_the_way(self) -> None:
        class Mixes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Conv2d(3, 8, 4, 4)
                self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                y = self.norm(self.embed(x).flatten(2).transpose(1, 2))
                return self.head(y.transpose(1, 2).reshape(x.shape[0], -1, 8)).mean(1)

        assert_refused(Mixes(), "norm", "channels are mixed between norm and head")

    def test_norm_is_the_output(self) -> None:
        class Ends(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(self.embed(x).flatten(2).transpose(1, 2)).mean(1)

        assert_refused(Ends(), "norm", "output (output) reads norm and is not a linear layer")


def assert_refused(model: nn.Module, norm: str, reason: str) -> None:
    torch.manual_seed(0)
    x = images(4, 16)
    graph_module = trace(model.eval(), x[:2])
    before = parameters_of(graph_module)
    notes = fold(graph_module, x)
    assert notes["refused"][norm] == reason
    after = parameters_of(graph_module)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_callers_model_is_untouched() -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    fold(trace(model, images(2)), images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_do_not_depend_on_the_batch_size() -> None:
    x = images(7)
    folded = []
    for batch_size in (1, 3, 7):
        graph_module = trace(vit().double(), x[:2].double())
        FoldSqb().apply(graph_module, PassContext(x.double(), batch_size=batch_size))
        folded.append(graph_module.state_dict())
    for name, value in folded[0].items():
        assert torch.allclose(value, folded[1][name], rtol=1e-9)
        assert torch.allclose(value, folded[2][name], rtol=1e-9)


def test_outlier_suppression_reduces_the_quantization_error_it_searches() -> None:
    from fxquant.quantizers.uniform import UniformQuantizer

    model = timm_model("vit_tiny_patch16_224", **VIT)
    with torch.no_grad():
        model.blocks[0].norm1.weight[2] = 40
    x = images(8)

    def error(switches: FoldSqb) -> float:
        graph_module = trace(model, x[:2])
        fold(graph_module, x, switches)
        seen: list[Tensor] = []
        graph_module.get_submodule("blocks.0.norm1").register_forward_hook(lambda _m, _i, y: seen.append(y))
        graph_module(x)
        weight, y = graph_module.get_submodule("blocks.0.attn.qkv").weight, seen[0]
        rounded = UniformQuantizer(4, weight.abs().amax(1, keepdim=True) / 7)(weight)
        return float(((UniformQuantizer(4, y.abs().max() / 7)(y) @ rounded.T) - y @ weight.T).square().mean())

    assert error(SWITCHES["OS+"]) < 0.5 * error(SWITCHES["none"])
    assert error(SWITCHES["SQ-b"]) < 0.5 * error(SWITCHES["none"])


@pytest.mark.parametrize("percentile", [90.0, 99.0, 100.0])
def test_a_percentile_cuts_the_range_of_every_channel(percentile: float) -> None:
    x = images(6)
    graph_module = trace(vit(), x[:2])
    seen = []
    hook = graph_module.get_submodule("blocks.0.norm1").register_forward_hook(lambda _, __, y: seen.append(y))
    graph_module(x)
    hook.remove()
    rows = seen[0].flatten(0, 1).double()
    tail = int((1 - percentile / 100) * (len(rows) - 1))
    ordered = rows.sort(0).values
    low, high = ordered[tail], ordered[-1 - tail]
    gamma = graph_module.get_submodule("blocks.0.norm1").weight.double()
    fold(graph_module, x, FoldSqb(strength=1.0, mu="midrange", percentile=percentile))
    folded = graph_module.get_submodule("blocks.0.norm1").weight.double()
    assert torch.allclose(gamma / folded, (high - low) / 2, rtol=1e-3)


def test_a_percentile_must_be_one() -> None:
    with pytest.raises(CalibrationError, match="above 50, up to 100"):
        FoldSqb(percentile=0.999)
