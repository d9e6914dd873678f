"""What a model brings besides its forward is in the graph, or refused with the remedy; the model stays the caller's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_file

from fxquant.errors import CalibrationError, CoverageError, ModelError, TraceError
from fxquant.graph.capture.tracing import trace
from tests.graph.capture.brought import (
    HANDLED,
    IMAGES_BCHW,
    LINEARS,
    REFUSED,
    Registry,
    check_traced,
    linears_of,
)


@pytest.mark.parametrize("name", HANDLED)
def test_graph_computes_what_the_given_model_does(name: str, plain: nn.Module) -> None:
    model = copy.deepcopy(plain)
    HANDLED[name](model)
    linears = linears_of(check_traced(model))
    assert len(linears) >= len(LINEARS)
    assert {path.removesuffix(".linear") for path in linears} >= LINEARS
    assert "blocks.0.mlp.fc1" in linears or "LoRA" in name
    assert Registry.known == ["Registered"]


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrappers_are_taken_off(wrap, plain: nn.Module) -> None:
    assert linears_of(trace(wrap(plain), IMAGES_BCHW)) == LINEARS
    wrapped = wrap(plain)
    wrapped.register_forward_hook(lambda m, i, o: o * 2)
    with pytest.raises(ModelError, match="has hooks: register them on the model inside, a VisionTransformer"):
        trace(wrapped, IMAGES_BCHW)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_with_the_remedy(name: str, plain: nn.Module) -> None:
    change, error, message = REFUSED[name]
    model = copy.deepcopy(plain)
    change(model)
    with pytest.raises(error, match=message):
        trace(model, IMAGES_BCHW)


def test_a_scripted_model_and_images_without_values_are_refused(plain: nn.Module) -> None:
    with pytest.raises(ModelError, match="the model is scripted or traced by torch"):
        trace(torch.jit.trace(nn.Linear(3, 2), torch.rand(1, 3)), IMAGES_BCHW)
    with pytest.raises(CalibrationError, match=r"on the meta device, where it has a shape and no values: give images"):
        trace(plain, IMAGES_BCHW.to("meta"))


def test_hooks_of_the_whole_process_are_kept_or_refused(plain: nn.Module) -> None:
    called = []
    hooks = [
        module_file.register_module_forward_hook(lambda module, inputs, output: called.append(1)),
        module_file.register_module_forward_pre_hook(lambda module, inputs: None),
    ]
    try:
        assert linears_of(trace(plain, IMAGES_BCHW)) == LINEARS
        hooks.append(module_file.register_module_forward_hook(lambda module, inputs, output: output * 1.01))
        with pytest.raises(TraceError, match="hooks are registered for all modules of the process, remove them"):
            trace(plain, IMAGES_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    assert called


class OddNames(nn.Module):
    """Submodules named after what the code of a graph uses, and an argument too."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("self", "torch", "graph", "meta", "code", "x", "operator", "getattr", "recompile_"):
            setattr(self, name, nn.Linear(4, 4))
        self.shape_env = nn.Parameter(torch.rand(4))

    def forward(self, torch):
        y = torch.flatten(2).mean(-1)
        for name in ("self", "torch", "graph", "meta", "code", "x", "operator", "getattr", "recompile_"):
            y = getattr(self, name)(y)
        return y * self.shape_env


def test_names_of_submodules_and_arguments_do_not_matter() -> None:
    model, images = OddNames().eval(), torch.rand(2, 4, 3, 3)
    graph_module = copy.deepcopy(trace(model, images))
    with torch.no_grad():
        torch.testing.assert_close(graph_module(images), model(images))
    assert len(linears_of(graph_module)) == 9


def test_weights_hidden_in_a_recurrent_layer_are_refused_with_a_remedy_that_exists(plain: nn.Module) -> None:
    class Recurrent(nn.Module):
        """Its own class, so that it is traced through to a leaf with hidden weights."""

        def __init__(self):
            super().__init__()
            self.inner = nn.GRU(12, 12, batch_first=True)

        def forward(self, x, **options):
            return self.inner(x)[0]

    model = copy.deepcopy(plain)
    model.blocks[0].attn = Recurrent()
    with pytest.raises(CoverageError, match=r"'blocks\.0\.attn\.inner'.*minimum_coverage=0\.\d+\)$") as refused:
        trace(model, IMAGES_BCHW)
    assert "lower minimum_coverage" not in str(refused.value)
    share = float(str(refused.value).rpartition("=")[2].rstrip(")"))
    trace(model, IMAGES_BCHW, minimum_coverage=share)


def test_several_arguments_are_refused_before_anything_runs() -> None:
    class Two(nn.Linear):
        def forward(self, images, mask):
            raise AssertionError

    class Keyword(nn.Linear):
        def forward(self, *, images):
            raise AssertionError

    with pytest.raises(TraceError, match=r"Two\.forward needs 2 arguments \(images, mask\): give those"):
        trace(Two(2, 2), IMAGES_BCHW)
    with pytest.raises(TraceError, match=r"Keyword\.forward takes 'images' by keyword only: wrap it"):
        trace(Keyword(2, 2), IMAGES_BCHW)


class After(nn.Module):
    """A function around a model's input or output."""

    def __init__(self, body: nn.Module, after: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body, self.after = body, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.body(x))


def test_a_model_that_takes_no_negative_pixels_is_traced(plain: nn.Module) -> None:
    model = nn.Sequential(After(nn.Identity(), torch.sqrt), plain)
    with torch.no_grad():
        torch.testing.assert_close(trace(model, IMAGES_BCHW)(IMAGES_BCHW), model(IMAGES_BCHW), rtol=1e-4, atol=1e-5)


def test_outputs_that_are_no_numbers_or_not_of_each_image_are_refused(plain: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="NaN or infinite numbers for the example"):
        trace(After(plain, lambda scores: scores / 0), IMAGES_BCHW)
    with pytest.raises(TraceError, match="gives 1 numbers for one image and 1 for 3"):
        trace(After(plain, lambda scores: scores.sum()), IMAGES_BCHW)
    with pytest.raises(TraceError, match="gives 5 numbers for one image and 5 for 3"):
        trace(After(plain, lambda scores: scores.mean(0)), IMAGES_BCHW)
