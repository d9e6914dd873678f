"""Tracing works on a copy: state, hooks, threads and whatever else is the caller's stays so."""

from __future__ import annotations

import copy
import functools
import threading
import types

import pytest
import torch
from torch import nn

from fxquant.errors import TraceError
from fxquant.graph.capture.plain_model import copy_of
from fxquant.graph.capture.tracing import trace
from tests.graph.capture.brought import (
    IMAGES_BCHW,
    check_traced,
    state_of,
)


def test_inference_mode_parameters_are_taken() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, 2))
        inside = trace(model, IMAGES_BCHW)
        expected = model(IMAGES_BCHW)
    for graph_module in (inside, trace(model, IMAGES_BCHW)):
        torch.testing.assert_close(graph_module(IMAGES_BCHW), expected)
        assert not any(parameter.is_inference() for parameter in graph_module.parameters())


class Stateful(nn.Module):
    """Counts its calls, follows its activations and keeps them, in every way a module can."""

    def __init__(self, uses_state: bool) -> None:
        super().__init__()
        self.embed, self.head, self.uses_state = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 2), uses_state
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("latest", torch.zeros(6))
        self.count, self.kept = 0, []

    def forward(self, images):
        x = self.embed(images).flatten(2).mean(2)
        self.calls += 1
        self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        self.latest = x.mean(0)
        self.count += 1
        self.kept.append(x)
        return self.head(x + self.mean if self.uses_state else x)


def test_state_that_forward_changes_stays_the_callers() -> None:
    model = Stateful(uses_state=False).eval()
    before = state_of(model)
    graph_module = trace(model, IMAGES_BCHW)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model.count, model.kept) == (0, [])
    with torch.no_grad():
        torch.testing.assert_close(graph_module(IMAGES_BCHW), model(IMAGES_BCHW))
    with pytest.raises(TraceError, match=r"the same image.*keeps a state"):
        trace(Stateful(uses_state=True), IMAGES_BCHW)


def test_what_a_hook_collects_stays_the_callers(plain: nn.Module) -> None:
    collected: list[object] = []
    model = copy.deepcopy(plain)
    model.norm.register_forward_hook(lambda module, inputs, output: collected.append(output))
    trace(model, IMAGES_BCHW)
    assert collected == []


def test_other_threads_are_not_touched(plain: nn.Module) -> None:
    """Two traces at once, and a third thread whose model has nothing to do with them."""
    other, stop = nn.Linear(2, 2), threading.Event()
    kinds: set[type] = set()
    failures: list[BaseException] = []

    def serve() -> None:
        while not stop.is_set():
            kinds.add(type(other(torch.ones(1, 2))))

    def compile_model() -> None:
        try:
            for _ in range(2):
                trace(plain, IMAGES_BCHW)
        except BaseException as error:
            failures.append(error)

    server = threading.Thread(target=serve)
    compilers = [threading.Thread(target=compile_model) for _ in range(2)]
    server.start()
    for thread in compilers:
        thread.start()
    for thread in compilers:
        thread.join()
    stop.set()
    server.join()
    assert failures == []
    assert kinds == {torch.Tensor}


def test_methods_of_a_copy_are_bound_to_it(plain: nn.Module) -> None:
    model = copy.deepcopy(plain)
    model.head.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) * 2, model.head)
    copied = copy_of(model)
    assert copied.head.forward.__self__ is copied.head
    check_traced(model)


def test_modules_that_hooks_hold_in_any_way_are_not_touched(plain: nn.Module) -> None:
    norm = nn.BatchNorm1d(5)

    def keyword(module: nn.Module, args: object, scores: torch.Tensor, *, norm: nn.Module = norm) -> torch.Tensor:
        return norm(scores)

    hooks = (
        keyword,
        functools.partial(lambda first, module, args, scores: norm(scores), 1),
        functools.partial(keyword, norm=norm),
    )
    for hook in hooks:
        model = copy.deepcopy(plain)
        model.head.register_forward_hook(hook)
        before = state_of(norm)
        copy_of(model)(IMAGES_BCHW)
        assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


class Functions(nn.Module):
    """Calls its layers through functions that it keeps in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.listed = [lambda scores: self.layer(scores), lambda scores: self.norm(scores)]
        self.named = {"again": (self.again,)}

    def again(self, scores: torch.Tensor) -> torch.Tensor:
        return self.layer(scores) + 1

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        for function in (*self.listed, *self.named["again"]):
            scores = function(scores)
        return scores


def test_functions_in_lists_call_the_layers_of_the_copy(plain: nn.Module) -> None:
    model = nn.Sequential(plain, Functions())
    before = state_of(model.train())
    graph_module = trace(model, IMAGES_BCHW)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {"1.layer", "1.norm"} <= {str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"}
    check_traced(model.eval())
