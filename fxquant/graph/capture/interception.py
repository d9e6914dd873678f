"""Calls, reads and writes of one model's modules go to a tracer; no other module of the process is touched.

`torch.fx` replaces `nn.Module.__call__` while it traces, for every model in every thread. Here each module of the copy
that is traced gets a class of its own instead, which inherits from its class and differs in three methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn


class Observer(Protocol):
    """What is told."""

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module was called; `forward` runs it, with its hooks.

        Args:
            m: the module.
            forward: runs the module, with its hooks.
            args, kwargs: what the module was called with.
        """

    def read(self, value: Any) -> Any:
        """An attribute was read; what the module is to get instead."""

    def assign_attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        """An attribute is set; what it is to be instead.

        Args:
            module: whose attribute is set.
            name: the name of the attribute.
            value: what the model's code sets it to.
        """


@contextmanager
def intercepted(root: nn.Module, observer: Observer) -> Iterator[None]:
    """Within, the observer stands between the model's code and its modules."""
    modules = list(root.modules())
    kinds = [type(module) for module in modules]
    replacements = {kind: _observed(kind, observer) for kind in set(kinds)}
    try:
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = replacements[kind]
        yield
    finally:
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = kind


def _observed(kind: type[nn.Module], observer: Observer) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return observer.call_module(self, lambda *a, **k: kind.__call__(self, *a, **k), args, kwargs)

    def get(self: nn.Module, name: str) -> Any:
        return observer.read(kind.__getattr__(self, name))

    def put(self: nn.Module, name: str, value: Any) -> None:
        kind.__setattr__(self, name, observer.assign_attribute(self, name, value))

    methods = {"__call__": call, "__getattr__": get, "__setattr__": put, "__module__": kind.__module__}
    # Neither the metaclass nor __init_subclass__ of the caller's class is to notice, since both may keep registers.
    observed: type[nn.Module] = type.__new__(type(kind), kind.__name__, (nn.Module,), dict(methods))
    try:
        observed.__bases__ = (kind,)
    except TypeError:  # its instances are laid out otherwise, as where it inherits from ABC first
        observed = type.__new__(type(kind), kind.__name__, (kind,), methods)
    return observed
