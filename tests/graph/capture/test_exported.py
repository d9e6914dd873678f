"""What torch.export makes of a model is read back into the graph that tracing the model gives."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import fxquant
from fxquant.errors import ModelError, TraceError
from fxquant.graph.annotation import annotation_of
from fxquant.graph.capture.exported import module_of_program
from fxquant.graph.capture.tracing import trace
from fxquant.graph.notes import EXPORTED
from tests.models import images, scrambled, traced, vit


def program_of(model: nn.Module, size: int = 32, **options) -> ExportedProgram:
    options = {"dynamic_shapes": ({0: Dim("batch", min=1)},), "strict": False, **options}
    return torch.export.export(model.requires_grad_(False), (images(3, size),), **options)


@functools.cache
def program() -> ExportedProgram:
    return program_of(vit(depth=1))


class Insists(nn.Module):
    """A model whose code takes tensors only, so that no proxy gets through it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Conv2d(3, 12, 8, 8), nn.MultiheadAttention(12, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, images, scale=1.0):
        if not isinstance(images, torch.Tensor):
            raise TypeError("tensors only")
        x = self.norm(self.embed(images).flatten(2).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return {"scores": self.head(nn.functional.normalize(x).mean(1)) * scale, "tokens": x}


class Draws(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(48, 4), function

    def forward(self, images):
        return self.function(self.layer(images.flatten(1)))


def layers(graph_module) -> list[tuple]:
    found = map(annotation_of, graph_module.graph.nodes)
    return [(annotation.role, annotation.layer, annotation.macs) for annotation in found if annotation.role]


def test_a_program_has_the_roles_and_layers_of_its_model() -> None:
    model = module_of_program(program())
    assert layers(traced(model, images(2))) == layers(traced(vit(depth=1), images(2)))
    assert torch.allclose(model(images(4)), vit(depth=1)(images(4)), atol=1e-5)


def test_a_program_is_compiled_as_a_model_is() -> None:
    quantized, expected = (
        fxquant.compile(model, "W8A8", calibration=images(4), recipe="naive_min_max")
        for model in (program(), vit(depth=1))
    )
    assert [row.layer for row in quantized.layers] == [row.layer for row in expected.layers]
    assert torch.allclose(quantized(images(5)), expected(images(5)), atol=1e-3)


def test_a_model_that_cannot_be_traced_is_exported_and_compared_with_itself() -> None:
    model = scrambled(Insists())
    graph_module = trace(model, images(2), inputs={"scale": 2.0})
    assert "tensors only" in EXPORTED.of(graph_module)
    scores, tokens = graph_module(images(5))
    assert torch.allclose(scores, model(images(5), 2.0)["scores"], atol=1e-4)
    assert torch.allclose(tokens, model(images(5), 2.0)["tokens"], atol=1e-4)


def test_tracing_comes_first() -> None:
    assert EXPORTED.get(trace(vit(depth=1), images(2))) is None


def test_what_neither_takes_is_refused_with_both_reasons() -> None:
    with pytest.raises(TraceError, match=r"how many images there are.*torch.export does not take it either"):
        trace(Draws(lambda x: torch.stack([x[i] for i in range(x.shape[0])])).eval(), images(2, 4))


def two_images(model: nn.Module) -> ExportedProgram:
    class Two(nn.Module):
        def forward(self, one, other):
            return one + other

    return torch.export.export(Two(), (images(2), images(2)), strict=False)


REFUSED = {
    "a fixed batch": (lambda: program_of(Draws(nn.Identity()), 4, dynamic_shapes=None), "a batch of any size"),
    "two tensors": (lambda: two_images(nn.Identity()), "images alone"),
    "an operation that is not listed": (lambda: program_of(Draws(torch.special.i0), 4), r"aten.special_i0.*not among"),
    "dropout in training": (
        lambda: program_of(Draws(lambda x: nn.functional.dropout(x, 0.5, True)), 4),
        "export model.eval",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_program_that_is_not_of_images_is_refused_by_name(name) -> None:
    make, says = REFUSED[name]
    with pytest.raises(TraceError, match=says):
        module_of_program(make())


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ModelError, match="an ExportedProgram is read"):
        module_of_program(vit(depth=1))
    with pytest.raises(ModelError):
        fxquant.compile(3, "W8A8", calibration=images(2))


FUNCTIONS = {
    "elementwise": lambda x: torch.clamp(x, -1, 1).exp() / (1 + x.abs()) - 2 * x.neg().sigmoid() + (2 - x).relu(),
    "moves": lambda x: torch.cat([x.view(-1, 2, 2).transpose(1, 2).flatten(1)[:, 1:], x.roll(1, 1)[:, :1]], 1),
    "sums": lambda x: x - x.mean(1, keepdim=True) + x.sum(-1, keepdim=True) + x.amax(1, keepdim=True),
    "selects": lambda x: torch.where(x > 0, x, 0.1 * x)[:, torch.tensor([3, 1, 0, 2])],
    "masks": lambda x: x.masked_fill(torch.tensor([True, False, False, True]), -3.0).softmax(1),
    "einsum": lambda x: torch.einsum("bi,bj->bj", x, x),
    "resized": lambda x: nn.functional.interpolate(x.view(-1, 1, 2, 2), size=(3, 3), mode="bilinear").flatten(1),
    "resized by factors": lambda x: nn.functional.interpolate(x.view(-1, 1, 2, 2), scale_factor=2).flatten(1),
    "pooled": lambda x: nn.functional.adaptive_avg_pool2d(x.view(-1, 1, 2, 2), 1).flatten(1) + x,
    "padded": lambda x: nn.functional.pad(x, (1, 2)),
    "in place": lambda x: x.clone().mul_(2).add_(1),
    "sizes of the batch": lambda x: x + torch.ones(x.shape[0], 4) * torch.arange(x.shape[0])[:, None],
    "split": lambda x: x.chunk(2, 1)[1] * x.split([2, 2], 1)[0],
    "norms": lambda x: nn.functional.normalize(x) + nn.functional.layer_norm(x, (4,)) + nn.functional.rms_norm(x, (4,)),
    "compares": lambda x: x * ((x > 0) & ~(x >= 1) | (x == 0)).float(),
    "groups": lambda x: nn.functional.group_norm(x.view(-1, 2, 2), 2).flatten(1),
    "instances": lambda x: nn.functional.instance_norm(x.view(-1, 2, 2), weight=torch.tensor([2.0, 3.0])).flatten(1),
    "quotients": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "powers": lambda x: 2**x + x**2,
    "windows": lambda x: x.view(-1, 1, 2, 2).unfold(2, 2, 2).flatten(1),
    "types": lambda x: x.double().to(x.dtype) + torch.zeros_like(x) + x.new_ones(4),
}


def test_operations_of_a_program_are_those_of_torch() -> None:
    model = Draws(lambda x: {name: function(x) for name, function in FUNCTIONS.items()}).eval()
    found = trace(module_of_program(program_of(model, 4)), images(2, 4))(images(5, 4))
    for name, one, other in zip(FUNCTIONS, found, model(images(5, 4)).values(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name


class Counts(nn.Module):
    """A model that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, images):
        self.calls.add_(1)
        return self.layer(images.flatten(1)) + self.calls


class HalvesItsImages(Draws):
    """A model that writes into a view of the caller's images."""

    def forward(self, images):
        images.flatten(1)[:, :8].mul_(0.5)
        return super().forward(images)


@pytest.mark.parametrize("make", [Counts, lambda: HalvesItsImages(nn.Identity())])
def test_a_program_that_writes_into_what_it_is_given_is_refused_and_nothing_changes(make) -> None:
    model = make().eval()
    written = program_of(model, 4)
    before = [tensor.clone() for tensor in (*model.state_dict().values(), *written.example_inputs[0])]
    with pytest.raises(TraceError, match="changes what it is given"):
        trace(written, images(2, 4))
    after = [*model.state_dict().values(), *written.example_inputs[0]]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_program_keeps_its_tensors_to_itself() -> None:
    given = program()
    model = module_of_program(given)
    own = {id(tensor) for tensor in given.state_dict.values()}
    assert not own & {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}


class GELU(nn.Module):
    """Of the same name as one of torch, and another function."""

    def forward(self, x):
        return nn.functional.gelu(x * 0.5, approximate="tanh") + x


class Named(Draws):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.own, self.twice = GELU(), nn.GELU()

    def forward(self, images):
        return self.twice(self.twice(self.own(super().forward(images))))


def test_a_module_is_known_by_its_class_and_not_by_a_name_like_it() -> None:
    model = Named().eval()
    found = module_of_program(program_of(model, 4))
    assert torch.allclose(found(images(5, 4)), model(images(5, 4)), atol=1e-5)
    assert isinstance(found.twice, nn.GELU)
    assert not isinstance(found.own, nn.GELU)
