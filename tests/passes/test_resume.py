"""A process that was killed goes on where it was: stopped after everything it keeps, it ends in the same model."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.cache import Cache
from fxquant.graph.tracing import trace
from passes.allocate_bits import AllocateBits
from passes.checkpoint import Checkpoint
from passes.contract import Journal, PassContext
from passes.correct_weights import CorrectWeights
from passes.distil import Distil
from passes.pipeline import Pipeline
from passes.prefix import run_prefix, split
from passes.recipes import recipe
from passes.reconstruct import Reconstruct
from tests.passes.models import images, vit

IMAGES = images(5)


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


class Dies(Cache):
    """Stops the process as soon as something new is kept."""

    def _put(self, name: str, content: bytes) -> bool:
        super()._put(name, content)
        raise Killed


@pytest.fixture(autouse=True)
def every_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, state, *, last=False: save(self, state, last=True))


def outcome(pipeline: Pipeline, cache: Cache) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors of the quantized model, and the journal without times."""
    context = PassContext(IMAGES, batch_size=2, cache=cache, journal=Journal())
    prefix, rest = split(pipeline)
    quantized = rest.run(run_prefix(prefix, TRACED, context), context)
    notes = [(entry.step, entry.nodes_changed, entry.notes) for entry in context.journal.entries]
    return quantized.state_dict(), [quantized.code, *notes]


TRACED = trace(vit(depth=1), IMAGES[:2])


def pipelines() -> dict[str, Pipeline]:
    few: dict[str, Any] = {"bits": (3, 4, 8)}
    allocated = recipe("mptq_vit")("W4A4", **few)
    return {
        "best": recipe("best")("W4A4", **few),
        "best, fully quantized": recipe("best")("W4A4", fully_quantized=True, **few),
        "lampq": recipe("lampq")("W4A4", **few),
        "mix_qvit": recipe("mix_qvit")("W4A4", **few),
        "corrected": allocated.after(AllocateBits, CorrectWeights()),
        "reconstructed": allocated.after(AllocateBits, Reconstruct(steps=4)),
        "trained": recipe("best_thorough")("W4A4", **few),
    }


@pytest.mark.parametrize("name", pipelines())
def test_a_run_killed_after_everything_it_keeps_ends_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["passes.recipes.best"], "Distil", partial(Distil, steps=4, checks=2))
    pipeline = pipelines()[name]
    tensors, told = outcome(pipeline, Cache())
    kills = 0
    while True:
        try:
            found, again = outcome(pipeline, Dies(tmp_path))
            break
        except Killed:
            kills += 1
    print(name, kills, sorted(f.suffix for f in tmp_path.iterdir()))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)
