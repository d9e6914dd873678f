"""The traced model of a session: who holds its tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from torch import nn

from fxquant.artefact.cache import Cache
from fxquant.session.model_source import ModelSource
from passes.pipeline.progress import SilentProgress
from tests.models import images, vit


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Only what nothing refers to goes, as in a compile that ends before Python collects its oldest objects."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_a_weight_replaced_in_the_given_up_graph_is_freed_at_once() -> None:
    source = ModelSource(vit(), images(), 0, 8, Cache(None), SilentProgress())
    assert source.with_roles is not source.traced
    traced = source.given_up()
    for linear in (module for module in traced.modules() if isinstance(module, nn.Linear)):
        weight = weakref.ref(linear.weight)
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        assert weight() is None
