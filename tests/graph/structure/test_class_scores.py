"""What counts as class scores, and what is told of anything else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from allocators.uniform import Uniform
from fxquant.errors import CalibrationError, SensitivityError
from fxquant.graph.capture.tracing import trace
from fxquant.graph.structure.class_scores import CLASSES, why_no_class_scores
from passes.recipes import best
from passes.search.calibrate import Calibrate
from tests.conformance.architectures import TRANSFORMERS
from tests.models import VIT, images, vit


class Net(nn.Module):
    """Tokens of a patch embedding and an MLP, then what a test puts there."""

    def __init__(self, finish: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.norm = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.finish = finish

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.finish(self, x + self.fc2(functional.gelu(self.fc1(self.norm(x)))))


def head(bias: bool = True, outputs: int = 5) -> dict[str, nn.Module]:
    return {"head": nn.Linear(8, outputs, bias=bias)}


SCORES = {
    "a head": lambda: Net(lambda net, x: net.head(x.mean(1)), **head()),
    "a head without bias": lambda: Net(lambda net, x: net.head(x[:, 0]), **head(bias=False)),
    "scores of tokens, averaged": lambda: Net(lambda net, x: net.head(x).mean(1), **head()),
    "two heads": lambda: Net(
        lambda net, x: (net.head(x[:, 0]) + net.other(x[:, 1])) / 2, **head(), other=nn.Linear(8, 5)
    ),
    "probabilities": lambda: Net(lambda net, x: net.head(x.mean(1)).log_softmax(-1), **head()),
    "scaled": lambda: Net(lambda net, x: net.head(x.mean(1)) * 2.5, **head()),
}
OTHER = {
    "one output": (lambda: Net(lambda net, x: net.head(x.mean(1)), **head(outputs=1)), "one number per image"),
    "pooled features": (lambda: Net(lambda net, x: net.norm(x).mean(1)), "comes from LayerNorm"),
    "a feature map, flattened": (lambda: Net(lambda net, x: x.flatten(1)), "a feature map"),
    "a residual stream, averaged": (lambda: Net(lambda net, x: x.mean(1)), "'norm' reads too, as features are"),
    "scores of tokens, flattened": (lambda: Net(lambda net, x: net.head(x).flatten(1), **head()), "a feature map"),
    "a projection": (
        lambda: Net(lambda net, x: net.proj(x.mean(1)), proj=nn.Linear(8, 5, bias=False)), "called a projection"
    ),
    "normalised embeddings": (
        lambda: Net(lambda net, x: functional.normalize(net.head(x.mean(1)), dim=-1), **head()), "features or embed"
    ),
    "divided by their norm": (
        lambda: Net(lambda net, x: (y := net.head(x.mean(1))) / y.norm(dim=-1, keepdim=True), **head()), "truediv"
    ),
    "activations": (lambda: Net(lambda net, x: net.head(x.mean(1)).tanh(), **head()), "tanh"),
    "tokens": (lambda: Net(lambda net, x: net.head(x), **head()), "shape (B, 16, 5)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_class_scores(name: str) -> None:
    assert why_no_class_scores(trace(SCORES[name]().eval(), images(2))) is None


@pytest.mark.parametrize("name", OTHER)
def test_anything_else_is_refused_with_a_reason(name: str) -> None:
    make, reason = OTHER[name]
    assert reason in str(why_no_class_scores(trace(make().eval(), images(2))))
    with pytest.raises(CalibrationError) as caught:
        fxquant.compile(make(), "W4A4", calibration=images(2), objective="classes")
    assert reason in str(caught.value)
    assert 'objective="features"' in str(caught.value)


def test_the_model_may_say_how_many_classes_it_has() -> None:
    odd = Net(lambda net, x: net.head(x.mean(1)).tanh(), **head())
    odd.num_classes = 5
    graph_module = trace(odd.eval(), images(2))
    assert CLASSES.of(graph_module) == 5
    assert why_no_class_scores(graph_module) is None
    features = timm.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 0, "depth": 1}).eval()
    assert "no head (num_classes=0) and gives 24 features" in str(why_no_class_scores(trace(features, images(2))))
    cut = vit(depth=1)
    cut.head = nn.Identity()  # num_classes still says 7
    assert "LayerNorm" in str(why_no_class_scores(trace(cut, images(2))))


@pytest.mark.parametrize("architecture", [a for a in TRANSFORMERS if "distilled" in a.name or "mixer" in a.name])
def test_classifiers_are_known_by_their_structure_too(architecture: object) -> None:
    model = timm.create_model(architecture.name, **architecture.options).eval()  # type: ignore[attr-defined]
    graph_module = trace(model, torch.rand(2, 3, architecture.size, architecture.size))  # type: ignore[attr-defined]
    assert why_no_class_scores(graph_module) is None
    del graph_module.meta[CLASSES.key]
    assert why_no_class_scores(graph_module) is None


def test_what_the_error_says_helps() -> None:
    """Features, compiled as the message shows, with more bits nearer to the model."""
    model = vit(depth=1)
    model.head = nn.Identity()
    x = images(4)

    def error(compiled: nn.Module) -> float:
        with torch.no_grad():
            wanted = model(x)
            return float((compiled(x) - wanted).square().mean() / wanted.var())

    by_name = error(fxquant.compile(model, "W8A8", calibration=x, recipe="repq_vit"))
    shown = best("W8A8", allocator=Uniform(), bits=(4, 8)).changed(Calibrate, gradient=False, output_error=True)
    assert max(by_name, error(fxquant.compile(model, None, calibration=x, recipe=shown))) < 0.02


def test_losses_that_say_nothing_are_refused() -> None:
    """A head of zeros: nothing that any layer computes reaches the output."""
    model = vit(depth=1)
    with torch.no_grad():
        model.get_parameter("head.weight").zero_()
    with pytest.raises(SensitivityError, match=r"all \d+ predicted losses are 0, so no allocation.*last layer"):
        fxquant.compile(model, "W4A4", calibration=images(2), recipe="mptq_vit")
