"""Freed memory goes back to the system between passes, of large models."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn

from passes.pipeline import freed_memory
from passes.pipeline.freed_memory import LARGE, give_back

needs_glibc = pytest.mark.skipif(freed_memory._trim() is None, reason="malloc_trim is glibc's")


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@needs_glibc
def test_what_lies_between_living_tensors_is_given_back() -> None:
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.empty(LARGE // 4)))
    # Pieces too small to be mapped by themselves, every second of which lives on.
    pieces = [torch.ones(15_000) for _ in range(4_000)]
    kept = pieces[::2]
    del pieces
    before = resident()
    give_back(model)
    assert before - resident() > 80 << 20
    assert len(kept) == 2_000


def test_small_models_and_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(freed_memory, "_trim", lambda: calls.append)
    give_back(nn.Linear(2, 2))
    assert not calls
    large = nn.Module()
    large.register_parameter("weight", nn.Parameter(torch.empty(LARGE // 4)))
    give_back(large)
    assert calls == [0]
    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    freed_memory._trim.cache_clear()
    assert freed_memory._trim() is None
    give_back(large)
    freed_memory._trim.cache_clear()
