"""tr(F) against per-sample gradients by torch.func, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx import GraphModule

from fxquant.errors import CalibrationError
from fxquant.graph.annotation import WEIGHT_ROLES, annotation_of, nodes_with_role
from fxquant.sensitivity.fisher import fisher_traces, squared_norms, type_factors
from fxquant.sensitivity.logit_gradients import label_gradients, logit_gradients
from tests.models import images, timm_model, traced, vit

IMAGES = images(5).double()


SWIN = {"img_size": 32, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "num_classes": 7}
MODELS = {"vit": lambda: vit(depth=1), "swin": lambda: timm_model("swin_tiny_patch4_window7_224", **SWIN)}


@pytest.fixture(scope="module", params=MODELS)
def graph_module(request: pytest.FixtureRequest) -> GraphModule:
    """In Swin the windows of an image are spread over the batch of the linear layers."""
    return traced(MODELS[request.param]().double(), IMAGES)


def per_sample(graph_module: GraphModule, cotangents_dbc: Tensor) -> dict[str, float]:
    """Mean over images and draws of the squared norm of every weight's gradient, one image and draw at a time."""
    weights = {name: value for name, value in graph_module.named_parameters() if name.endswith("weight")}

    def score(weights: dict[str, Tensor], image: Tensor, cotangent: Tensor) -> Tensor:
        return (functional_call(graph_module, weights, (image[None],))[0] * cotangent).sum()

    totals = dict.fromkeys(weights, 0.0)
    for cotangents in cotangents_dbc:
        gradients = vmap(grad(score), in_dims=(None, 0, 0))(weights, IMAGES, cotangents)
        for name, gradient in gradients.items():
            totals[name] += float(gradient.square().sum()) / len(cotangents_dbc) / len(IMAGES)
    return totals


def numbered(together: int) -> list[tuple[int, Tensor]]:
    """Batches with the index of their first image."""
    return list(zip(range(0, len(IMAGES), together), IMAGES.split(together), strict=True))


@pytest.mark.parametrize("labelled", [False, True])
def test_traces_are_those_of_per_sample_gradients(graph_module: GraphModule, labelled: bool) -> None:
    """qkv, proj, fc1, fc2 with tokens, the head without, the patch embedding as a convolution, Swin's reduction."""
    nodes = nodes_with_role(graph_module, *WEIGHT_ROLES)
    assert len(nodes) in (6, 11)
    p = graph_module(IMAGES).softmax(1).detach()
    labels = torch.arange(5) if labelled else None
    cotangents = label_gradients(p, labels) if labelled else logit_gradients(p, "signs", 3, seed=7)
    expected = per_sample(graph_module, cotangents)
    found = fisher_traces(graph_module, nodes, numbered(2), draws=3, seed=7, labels_n=labels)
    for node, trace in found.items():
        assert trace == pytest.approx(expected[f"{node.target}.weight"], rel=1e-9), annotation_of(node).layer
        assert trace > 0


def test_batches_have_no_say(graph_module: GraphModule) -> None:
    nodes = nodes_with_role(graph_module, *WEIGHT_ROLES)
    whole, parts = (fisher_traces(graph_module, nodes, numbered(size)) for size in (5, 1))
    assert list(whole.values()) == pytest.approx(list(parts.values()), rel=1e-9)


def test_grouped_convolutions_are_left_out() -> None:
    """Rather than said to have no trace, which would cost them their bits."""
    model = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8, groups=3), nn.Flatten(), nn.Linear(96, 4)).double()
    graph_module = torch.fx.symbolic_trace(model)
    nodes = [node for node in graph_module.graph.nodes if node.target in ("0", "2")]
    assert [str(node.target) for node in fisher_traces(graph_module, nodes, numbered(5))] == ["2"]


@pytest.mark.parametrize(("tokens", "inner", "outer"), [(3, 40, 50), (60, 8, 9), (1, 5, 7)])
def test_both_forms_of_the_norm_are_equal(tokens: int, inner: int, outer: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, tokens, inner, generator=generator, dtype=torch.float64)
    g = torch.randn(4, tokens, outer, generator=generator, dtype=torch.float64)
    direct = torch.einsum("bti,bto->bio", x, g).square().sum((1, 2))
    assert torch.allclose(squared_norms(x, g), direct, rtol=1e-12)


def test_float32_is_close_with_a_channel_that_dominates() -> None:
    """Massive activations make the terms of the first form cancel."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 50, size, generator=generator, dtype=torch.float64) for size in (200, 300))
    x[..., 0] += 50
    exact = torch.einsum("bti,bto->bio", x, g).square().sum((1, 2))
    assert torch.allclose(squared_norms(x.float(), g.float()), exact, rtol=1e-4)


def test_too_few_labels_and_no_class_scores(graph_module: GraphModule) -> None:
    nodes = nodes_with_role(graph_module, *WEIGHT_ROLES)
    with pytest.raises(CalibrationError, match="4 labels for at least 5 images"):
        fisher_traces(graph_module, nodes, numbered(5), labels_n=torch.zeros(4, dtype=torch.int64))

    class Pixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(CalibrationError, match="the Fisher trace needs class scores"):
        fisher_traces(torch.fx.symbolic_trace(Pixels()), [], numbered(5))


def test_type_factors_are_ratios_of_means_over_sampled_layers() -> None:
    traces = {"a": 2.0, "b": 6.0, "c": 5.0, "d": 0.0}
    kinds = {"a": "fc1", "b": "fc1", "c": "proj", "d": "fc2"}
    drops = {"a": 1.0, "b": 3.0, "c": 0.5, "d": 0.0}
    assert type_factors(traces, drops, kinds) == {"fc1": 0.5, "proj": 0.1, "fc2": 0.0}
