"""Names of modules: free ones for new modules, whatever the model's author called things."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule

from fxquant.checks.untrusted import check_path
from fxquant.graph.capture.tracing import trace
from fxquant.graph.names import add_module, exchange_module, free_name, free_path, separate_calls

pytestmark = pytest.mark.quick


class Anything(nn.Module):
    """A module that says it has every attribute."""

    def __getattr__(self, name: str) -> object:
        return self._modules.get(name, 0) if "_modules" in vars(self) else 0


def graph_of(root: nn.Module, *targets: str) -> GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for target in targets:
        x = graph.call_module(target, (x,))
    graph.output(x)
    return GraphModule(root, graph)


def test_a_name_is_free_where_no_attribute_has_it() -> None:
    owner = nn.Module()
    owner.add_module("act", nn.GELU())
    owner.register_buffer("act_1", torch.zeros(1))
    owner.flag = True
    assert free_name(owner, "norm") == "norm"
    assert free_name(owner, "act") == "act_2"
    assert free_name(owner, "flag") == "flag_1"
    assert free_name(Anything(), "constant") == "constant"


def test_names_of_torch_and_of_python_are_not_free_and_paths_can_be_saved() -> None:
    for wanted in ("forward", "training", "T_destination", "graph", "code", "class", "__init__", "", "attn@1", "ä b"):
        name = free_name(nn.Module(), wanted)
        assert check_path(name) == name
        assert not hasattr(nn.Module, name)
        assert name != "class"


def test_a_path_goes_round_what_is_no_module() -> None:
    root = nn.Module()
    root.add_module("block", nn.Module())
    root.block.attn = 3
    graph_module = graph_of(nn.Sequential(nn.GELU()), "0")
    graph_module.add_module("block", root.block)
    assert free_path(graph_module, "block.attn.qk") == "block.attn_1.qk"
    assert add_module(graph_module, "block.attn.qk", nn.ReLU()) == "block.attn_1.qk"
    assert add_module(graph_module, "block.attn_1.qk", nn.Tanh()) == "block.attn_1.qk_1"
    assert isinstance(graph_module.get_submodule("block.attn_1.qk"), nn.ReLU)


def test_a_module_is_exchanged_in_its_place_unless_another_node_needs_it() -> None:
    root = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    graph_module = graph_of(root, "0", "1", "1")
    linear, first, second, *_ = [n for n in graph_module.graph.nodes if n.op == "call_module"]
    exchange_module(graph_module, first, nn.ReLU())
    exchange_module(graph_module, second, nn.Tanh())
    assert (first.target, second.target) == ("1_1", "1")
    assert isinstance(graph_module.get_submodule("1_1"), nn.ReLU)
    with graph_module.graph.inserting_before(linear):
        graph_module.graph.get_attr("0.weight")
    exchange_module(graph_module, linear, nn.Identity())
    assert linear.target == "0_1"
    assert isinstance(graph_module.get_submodule("0"), nn.Linear)


def test_every_call_has_a_module_of_its_own() -> None:
    graph_module = graph_of(nn.Sequential(nn.Linear(2, 2)), "0", "0", "0")
    x = torch.randn(3, 2)
    expected = graph_module(x)
    separate_calls(graph_module)
    graph_module.recompile()
    assert [n.target for n in graph_module.graph.nodes if n.op == "call_module"] == ["0", "0_1", "0_2"]
    graph_module.get_submodule("0_1").weight.data.add_(1)
    assert torch.equal(graph_module.get_submodule("0").weight, graph_module.get_submodule("0_2").weight)
    graph_module.get_submodule("0_1").weight.data.sub_(1)
    torch.testing.assert_close(graph_module(x), expected)


@pytest.mark.parametrize("name", ["class", "a-b", "ä", "x y", "graph", "code", "meta", "0"])
def test_models_may_call_their_modules_anything(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = nn.Module()
            for owner in (self, self.held):
                owner.add_module(name, nn.Module())
                owner._modules[name].fc = nn.Linear(4, 4)
                owner._modules[name].register_parameter(name, nn.Parameter(torch.randn(4)))

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            for owner in (self, self.held):
                x = owner._modules[name].fc(x) * owner._modules[name]._parameters[name]
            return x

    model, x = Named(), torch.randn(2, 1, 2, 2)
    graph_module = trace(model, x)
    torch.testing.assert_close(graph_module(x), model(x))
    targets = [str(n.target) for n in graph_module.graph.nodes if n.op in ("call_module", "get_attr")]
    assert [check_path(target) for target in targets] == targets
    assert name in model._modules, "the caller's model keeps its names"


def test_a_constant_does_not_take_the_name_of_what_is_there() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant, self.head = 2.0, nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1) * (self.scale * self.constant))

    model, x = Named(), torch.randn(2, 1, 2, 2)
    torch.testing.assert_close(trace(model, x)(x), model(x))
