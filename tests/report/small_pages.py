"""Small models whose pages are tested: compiled once a process."""

from __future__ import annotations

import functools

from allocators.greedy import Greedy
from fxquant.session.compiled import Compiled
from fxquant.session.session import Session
from passes.allocate.measure_losses import MeasureLosses
from passes.pipeline.pipeline import Pipeline
from passes.recipes.mptq_vit import naive_min_max
from tests.models import images, vit

HOSTILE = '</script><img src=x onerror="window.hacked=1"><b>{{ 7 * 7 }}'


@functools.cache
def small_session() -> Session:
    """A ViT of two blocks, calibrated once, whatever the budget and the overrides."""
    return Session(vit(), images(2), recipe="naive_min_max", card={"model": HOSTILE, "recipe": "naive_min_max"})


@functools.cache
def small_compiled() -> Compiled:
    """That ViT at mixed bits; not to be changed."""
    return small_session().compile("W4A4", Greedy())


@functools.cache
def measured_compiled() -> Compiled:
    """One whose losses were measured too; not to be changed."""
    steps = naive_min_max("W4A4")
    place = next(i for i, step in enumerate(steps) if type(step).__name__ == "AllocateBits") + 1
    pipeline = Pipeline([*steps[:place], MeasureLosses(images=1), *steps[place:]])
    return Session(vit(), images(2), recipe=pipeline).compile(None)
