"""Modes of torch that a caller may be in, and that would have a say in how a model is made, kept and run.

    @exact()                # no autocast, no coarser products, no inference mode: a model computes in its own dtype
    @usual()                # besides, new tensors are float32 and on the CPU, where nobody says otherwise

A caller's own forward keeps the default dtype and device that it was written under: it is run inside of `exact` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_KINDS = ("cpu", "cuda")  # of devices that autocast is for


@contextmanager
def exact() -> Iterator[None]:
    """Inside, operations compute in the dtype of what they are given, and tensors count their versions."""
    with torch.inference_mode(False), without_autocast(), _whole_products():
        yield


@contextmanager
def _whole_products() -> Iterator[None]:
    """Inside, products of float32 are of float32, whatever `torch.set_float32_matmul_precision` allows them to be."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for one backend, and torch does not say
        before = "highest"
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def usual() -> Iterator[None]:
    """Inside, `exact`, and tensors are made in float32 and on the CPU unless their dtype or device is given."""
    dtype = torch.get_default_dtype()
    with ExitStack() as modes:
        modes.enter_context(exact())
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            modes.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, autocast has no say."""
    with ExitStack() as modes:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield
