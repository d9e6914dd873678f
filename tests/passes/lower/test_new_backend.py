"""A backend is one module: whoever lists, restricts, chooses or lowers to backends knows it by its file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import passes.lower.backends as room
from allocators.uniform import Uniform
from fxquant.errors import BackendError
from fxquant.graph.notes import execution_of
from passes.lower.backends import backend_names, backends
from passes.lower.lower import Lower, backend_summary, resolved
from passes.pipeline.contract import PassContext
from passes.recipes import RECIPES
from passes.recipes.restrict_families import restrict_families
from passes.search.plan_operands import PlanOperands
from tests.models import images, traced, vit

MODULE = '''
"""Linear layers whose kernel is a name."""

from fxquant.errors import BackendError
from fxquant.runtime.integer.torch_linear import IntMmLinear
from passes.lower.backend import Backend
from passes.lower.rewrites.exchange_linears import UNIFORM_INSTEAD, ExchangeLinears, uniform_linears

BACKEND = Backend(
    name="a-new-one",
    summary="linear layers",
    families={"symmetric": 6},
    edges=("other",),
    instead=UNIFORM_INSTEAD,
    finds=uniform_linears,
    why_absent=lambda: None,
    pipeline=(ExchangeLinears(IntMmLinear, "linear new"),),
)
'''


@pytest.fixture
def new_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "a_new_one.py").write_text(MODULE)
    monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path)])
    backends.cache_clear()
    yield "a-new-one"
    backends.cache_clear()


@pytest.mark.quick
def test_a_backend_is_called_as_its_module() -> None:
    assert [found.name for found in backends().values()] == list(backends()) == list(backend_names()[1:])
    assert backend_names()[0] == "auto"


@pytest.mark.quick
def test_auto_tries_backends_in_the_order_that_they_say() -> None:
    assert resolved("auto") in ("cpu-native", "cpu-onednn", "simulated")
    choices = [found.choice for found in backends().values() if found.choice is not None]
    assert len(set(choices)) == len(choices)
    assert backends()["simulated"].choice == max(choices)


def test_one_file_is_a_backend(new_backend: str) -> None:
    assert new_backend in backend_names()
    plan = restrict_families(PlanOperands(other="symmetric|opt-m", post_gelu="opt-m"), new_backend)
    assert (plan.other, plan.post_gelu) == ("symmetric<=6", "opt-m")
    x = images(2)
    recipe = RECIPES["naive_min_max"]("W6A6", bits=(6,), allocator=Uniform(), backend=new_backend)
    graph_module = recipe.run(traced(vit(depth=1), x), PassContext(x))
    assert backend_summary(graph_module, new_backend).startswith("a-new-one: 5 of 8 layers run as integers")
    context = PassContext()
    Lower(new_backend).apply(graph_module, context)
    assert set(execution_of(graph_module).values()) == {"simulated", "linear new"}
    with torch.inference_mode():
        assert graph_module(x).isfinite().all()
    with pytest.raises(BackendError, match="a-new-one"):
        Lower("another-one")
