"""Kernels in every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxquant.runtime.native import library

SETS = () if library.why_absent() else library.instruction_sets()


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    library.select_instruction_set(request.param)
    yield request.param
    library.select_instruction_set()
