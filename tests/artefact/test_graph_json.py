"""Graphs survive JSON exactly; what a file may not name is refused at both ends."""

from __future__ import annotations

import copy
import math
import operator

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.artefact.graph_json import graph_to_json
from fxquant.artefact.module_settings import CLASSES
from fxquant.graph.annotation import Annotation, Operand, Role, Source, annotate, annotation_of
from fxquant.graph.facts import QUANTIZED, ROLES_ASSIGNED, TRACED, facts_of
from fxquant.graph.notes import COVERAGE, IMAGE_SHAPE
from fxquant.quantizers.families import families_named
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.simulated import QuantizedLinear
from tests.artefact.small_graphs import one_call, one_module, round_trip


def test_names_arguments_and_outputs_survive(small):
    loaded = round_trip(small)
    image = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(image), small(image))
    assert loaded.code == small.code
    assert [node.name for node in loaded.graph.nodes] == [node.name for node in small.graph.nodes]
    assert not loaded.training


def test_annotations_facts_and_shapes_survive(small):
    loaded = round_trip(small)
    assert facts_of(loaded) == {TRACED, ROLES_ASSIGNED, QUANTIZED}
    assert IMAGE_SHAPE.of(loaded) == (3, 8, 8)
    assert COVERAGE.of(loaded) == COVERAGE.of(small)
    for ours, theirs in zip(loaded.graph.nodes, small.graph.nodes, strict=True):
        assert annotation_of(ours) == annotation_of(theirs)
        if "tensor_meta" in theirs.meta:
            assert ours.meta["tensor_meta"].shape == theirs.meta["tensor_meta"].shape
            assert ours.meta["tensor_meta"].dtype == theirs.meta["tensor_meta"].dtype


def test_every_annotation_but_candidates_survives():
    graph_module = one_call("call_method", "contiguous")
    node = list(graph_module.graph.nodes)[1]
    weight = Operand(None, Source.WEIGHT, 1, families_named("symmetric"), bits=4, pinned=True)
    x = Operand(0, Source.POST_SOFTMAX, 3, families_named("log2<=4|twin-softmax"), tied=True, bits=5)
    values = {"role": Role.FC1, "layer": "a.b", "block": 0, "macs": 2, "operands": (weight, x)}
    annotate(node, **values)
    loaded = list(round_trip(graph_module).graph.nodes)[1]
    assert annotation_of(loaded) == Annotation(**values)


ARGUMENTS = [
    None, True, 3, -2.5, 1e-30, math.inf, -math.inf, "text", "a'\"\\\n", [1, [2, None]], (1, (2.0, True)), (), [],
    {"a": (1,), "b": [None]}, slice(None, 3, None), (slice(None), ..., 0), torch.float16, torch.bool,
    torch.device("cpu"), torch.channels_last, ...,
]  # fmt: skip


@pytest.mark.parametrize("value", ARGUMENTS, ids=repr)
def test_every_kind_of_argument_survives(value):
    node = list(round_trip(one_call("call_method", "to", value, key=value)).graph.nodes)[1]
    assert node.args[1] == value
    assert node.kwargs["key"] == value
    assert type(node.kwargs["key"]) is type(value) or isinstance(value, list | dict)


def test_nodes_inside_nested_arguments_survive():
    graph = Graph()
    x = graph.placeholder("x")
    size = graph.call_function(getattr, (x, "shape"))
    batch = graph.call_function(operator.getitem, (size, 0))
    graph.output(graph.call_method("reshape", (x, (batch, -1))))
    graph_module = GraphModule(nn.Module(), graph)
    image = torch.rand(3, 2, 2)
    assert torch.equal(round_trip(graph_module)(image), image.reshape(3, 4))


MODULES = [
    (nn.Linear(4, 3, bias=False), (2, 4)),
    (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), (1, 4, 8, 8)),
    (nn.Conv2d(2, 2, 3, padding="same", padding_mode="reflect"), (1, 2, 8, 8)),
    (nn.Conv1d(4, 2, 1), (1, 4, 5)),
    (nn.LayerNorm((3, 4), eps=1e-3), (2, 3, 4)),
    (nn.LayerNorm(4, elementwise_affine=False), (2, 4)),
    (nn.LayerNorm(4, bias=False), (2, 4)),
    (nn.RMSNorm(4), (2, 4)),
    (nn.GroupNorm(2, 4), (1, 4, 3)),
    (nn.BatchNorm1d(4), (5, 4)),
    (nn.BatchNorm2d(4, affine=False), (1, 4, 3, 3)),
    (nn.GELU("tanh"), (2, 4)),
    (nn.LeakyReLU(0.3), (2, 4)),
    (nn.PReLU(4), (2, 4)),
    (nn.AvgPool1d(2), (1, 2, 4)),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (1, 2, 8, 8)),
    (nn.AdaptiveAvgPool2d((2, None)), (1, 2, 8, 8)),
    (nn.MaxPool2d(3, 2, 1), (1, 2, 8, 8)),
    (nn.Unfold((2, 2), stride=2), (1, 2, 4, 4)),
    (nn.Flatten(), (2, 3, 4)),
    (nn.Upsample(scale_factor=2.0, mode="bilinear"), (1, 2, 4, 4)),
    (nn.PixelShuffle(2), (1, 4, 2, 2)),
    (nn.Linear(4, 3).double(), (2, 4)),
]


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: str(value)[:40])
def test_modules_survive(module, shape):
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    graph_module = one_module(module)
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    x = torch.rand(*shape, dtype=dtype)
    loaded = round_trip(graph_module)
    assert torch.equal(loaded(x), graph_module(x))
    assert repr(loaded.get_submodule("body.layer")) == repr(module)
    assert loaded.state_dict().keys() == graph_module.state_dict().keys()


@pytest.mark.parametrize(
    "kind", [kind for kind, arguments in CLASSES.items() if not arguments], ids=lambda k: k.__name__
)
def test_modules_without_settings_survive(kind):
    assert type(round_trip(one_module(kind())).get_submodule("body.layer")) is kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("zero_point", [None, 3])
@pytest.mark.parametrize("bias", [None, torch.rand(3)])
def test_quantized_linear_survives(dtype, zero_point, bias):
    weight = torch.randn(3, 7).to(dtype)
    quantizer = UniformQuantizer(3, torch.full((3, 1), 0.3), zero_point and torch.full((3, 1), zero_point))
    module = QuantizedLinear(weight, None if bias is None else bias.to(dtype), quantizer, None)
    loaded = round_trip(one_module(module)).get_submodule("body.layer")
    assert torch.equal(loaded.weight, module.weight)
    assert loaded.weight.dtype == dtype
    assert torch.equal(loaded.weight_codes, module.weight_codes)


def test_float_weights_of_quantized_layers_survive():
    module = QuantizedLinear(torch.randn(3, 7), None, None, UniformQuantizer(4, 0.1))
    graph_module = one_module(module)
    x = torch.randn(2, 7)
    assert torch.equal(round_trip(graph_module)(x), graph_module(x))


def test_a_module_called_inside_another_keeps_its_path():
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("body.act", (graph.call_module("body", (x,)),)))
    root = nn.Module()
    root.body = nn.Linear(3, 3)
    root.body.act = nn.GELU()
    graph_module = GraphModule(root, graph)
    x = torch.rand(2, 3)
    assert torch.equal(round_trip(graph_module)(x), graph_module(x))


def test_unused_modules_and_unused_tensors_are_not_kept():
    graph_module = one_module(nn.Linear(2, 2))
    graph_module.add_module("spare", nn.Linear(100, 100))
    graph_module.register_buffer("more", torch.rand(3))
    document, tensors = graph_to_json(graph_module)
    assert tensors.keys() == {"body.layer.weight", "body.layer.bias"}
    assert document["modules"].keys() == {"body.layer"}


def test_a_tensor_read_from_inside_a_module_is_the_modules():
    graph = Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("layer.weight")
    graph.output(graph.call_function(torch.matmul, (graph.call_module("layer", (x,)), weight)))
    root = nn.Module()
    root.layer = nn.Linear(3, 3).requires_grad_(False)
    graph_module = GraphModule(root, graph)
    x = torch.rand(2, 3)
    assert torch.equal(round_trip(graph_module)(x), graph_module(x))


def test_the_saved_module_is_left_alone_and_shares_nothing(small):
    before = copy.deepcopy(small.state_dict())
    loaded = round_trip(small)
    for tensor in loaded.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())
