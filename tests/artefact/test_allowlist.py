"""What is not on the lists is not saved, and the lists are closed, harmless and complete."""

from __future__ import annotations

import builtins
import math
import operator
import os

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.artefact import operation_sizes
from fxquant.artefact.allowlist import ATTRIBUTES, FUNCTION_NAMES, FUNCTIONS, METHODS
from fxquant.artefact.graph_json import graph_to_json
from fxquant.artefact.operation_sizes import predicted_elements
from fxquant.errors import ArtefactError
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.simulated import QuantizedLinear
from tests.artefact.small_graphs import one_call, one_module, round_trip


def evil(x):
    return x


@pytest.mark.parametrize(
    ("op", "target", "args", "named"),
    [
        ("call_function", os.system, (), "system"),
        ("call_function", eval, (), "eval"),
        ("call_function", torch.load, (), "load"),
        ("call_function", evil, (), "evil"),
        ("call_function", getattr, ("__class__",), "__class__"),
        ("call_function", getattr, ("grad_fn",), "grad_fn"),
        ("call_method", "apply_", (), "apply_"),
        ("call_method", "__reduce__", (), "__reduce__"),
        ("call_method", "to", (object(),), "object"),
    ],
)
def test_saving_refuses_what_is_not_allowed(op, target, args, named):
    graph_module = one_call("call_function", torch.relu)
    node = list(graph_module.graph.nodes)[1]
    node.op, node.target, node.args = op, target, (node.args[0], *args)
    with pytest.raises(ArtefactError, match=named):
        graph_to_json(graph_module)


class Scaled(nn.Linear):
    """A linear layer that is not exactly nn.Linear."""


@pytest.mark.parametrize("module", [Scaled(2, 2), nn.MultiheadAttention(4, 2), nn.Sequential()])
def test_saving_refuses_unknown_classes_and_says_what_to_do(module):
    with pytest.raises(ArtefactError, match=rf"'body.layer' is a .*{type(module).__name__}.*write it out in forward"):
        graph_to_json(one_module(module))


def test_saving_refuses_quantizers_that_cannot_be_loaded():
    with pytest.raises(ArtefactError, match="12 bits"):
        graph_to_json(one_module(QuantizedLinear(torch.rand(2, 2), None, None, UniformQuantizer(12, 0.1))))
    with pytest.raises(ArtefactError, match="NaN"):
        graph_to_json(one_module(QuantizedLinear(torch.rand(2, 2), None, None, UniformQuantizer(4, math.nan))))
    quantizer = UniformQuantizer(8, torch.full((2, 1), 0.005), torch.zeros((2, 1)))
    too_large_for_int8 = QuantizedLinear(torch.ones(2, 2), None, quantizer, None)
    with pytest.raises(ArtefactError, match=r"body.layer.*do not fit 8 bits"):
        graph_to_json(one_module(too_large_for_int8))


def test_the_allowlist_is_closed_and_harmless():
    assert all(callable(call) and FUNCTIONS[FUNCTION_NAMES[call]] is call for call in FUNCTIONS.values())
    forbidden = {eval, exec, compile, open, __import__, builtins.setattr, builtins.delattr, operator.methodcaller}
    assert not forbidden & set(FUNCTIONS.values())
    assert not any(name.rpartition(".")[2] in ("load", "save", "compile", "from_file") for name in FUNCTIONS)
    assert not any(name.startswith("__") for name in METHODS | ATTRIBUTES)
    assert not {"apply_", "map_", "map2_", "register_hook", "numpy", "untyped_storage"} & METHODS
    assert all(hasattr(torch.Tensor, name) for name in METHODS | ATTRIBUTES)


def test_what_torch_spells_as_function_and_method_is_allowed_as_both():
    elementwise = [
        "abs",
        "absolute",
        "acos",
        "asin",
        "atan",
        "ceil",
        "cos",
        "cosh",
        "deg2rad",
        "erf",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "frac",
        "isfinite",
        "isinf",
        "isnan",
        "log",
        "log10",
        "log1p",
        "log2",
        "nan_to_num",
        "neg",
        "negative",
        "rad2deg",
        "reciprocal",
        "relu",
        "round",
        "rsqrt",
        "sgn",
        "sigmoid",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "tan",
        "tanh",
        "trunc",
    ]
    over_an_axis = ["cumprod", "cumsum", "log_softmax", "logsumexp", "softmax"]
    for name in elementwise + over_an_axis:
        axis = (-1,) if name in over_an_axis else ()
        for graph_module in (
            one_call("call_method", name, *axis),
            one_call("call_function", getattr(torch, name), *axis),
        ):
            x = torch.rand(2, 3)
            assert torch.equal(round_trip(graph_module)(x), graph_module(x)), name
            assert predicted_elements(name, (x, *axis), {}) >= graph_module(x).numel()


def test_what_functions_write_to_may_be_named_where_it_is_nothing():
    graph_module = one_call("call_function", torch.nn.functional.normalize, p=2.0, dim=1, eps=1e-12, out=None)
    assert torch.equal(round_trip(graph_module)(torch.ones(2, 4)), torch.full((2, 4), 0.5))
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, 1), {"out": x}))
    with pytest.raises(ArtefactError, match="may not give"):
        round_trip(GraphModule(nn.Module(), graph))


def test_every_listed_function_is_sized_by_a_name_that_it_has():
    named = {name.rpartition(".")[2] for name in FUNCTIONS}
    unknown = {call.__name__ for call in FUNCTIONS.values()} - named - operation_sizes._BROADCAST
    assert not unknown - operation_sizes._RULES.keys(), "what is in no table is looked up by its name"
