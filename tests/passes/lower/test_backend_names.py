"""Backends by name: those of the room's modules, and those that are registered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxquant.errors import BackendError
from passes.lower.backends import backend_names, forget, register
from passes.lower.backends.simulated import BACKEND
from passes.lower.lower import Lower

pytestmark = pytest.mark.quick


def test_a_name_that_is_taken_is_refused() -> None:
    for name in backend_names():
        with pytest.raises(BackendError, match=f"called '{name}' already"):
            register(replace(BACKEND, name=name))


def test_a_registered_backend_can_be_named() -> None:
    with pytest.raises(BackendError, match="no backend is called 'paper'"):
        Lower("paper")
    register(replace(BACKEND, name="paper"))
    try:
        assert Lower("paper").backend == "paper"
        assert backend_names()[-1] == "paper"
    finally:
        forget("paper")
    assert "paper" not in backend_names()
