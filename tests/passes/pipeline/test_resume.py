"""A process that was killed goes on where it was: stopped again and again, it ends in the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.artefact.cache import Cache, signature
from fxquant.artefact.container import write_file
from fxquant.artefact.searched_graph import searched_from_file, searched_to_file
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import facts_of
from fxquant.quantizers.search import search_weight
from passes.allocate.allocate_bits import AllocateBits
from passes.correct.correct_weights import CorrectWeights
from passes.correct.distil import Distil
from passes.correct.reconstruct import Reconstruct
from passes.pipeline.checkpoint import Checkpoint
from passes.pipeline.contract import PassContext
from passes.pipeline.journal import Journal
from passes.pipeline.pipeline import Pipeline
from passes.recipes import recipe
from passes.search.search_cache import run_prefix, split
from tests.models import ARCHITECTURES, images, vit

IMAGES = images(4)
FEW: dict[str, Any] = {"bits": (3, 4, 8)}
PIPELINES = {
    "best, fully quantized": lambda: recipe("best")("W4A4", fully_quantized=True, **FEW),
    "lampq": lambda: recipe("lampq")("W4A4", **FEW),
    "vt_ptq": lambda: recipe("vt_ptq")("W4A4", **FEW),
    "mix_qvit": lambda: recipe("mix_qvit")("W4A4", **FEW),
    "corrected": lambda: recipe("mptq_vit")("W4A4", **FEW).after(AllocateBits, CorrectWeights()),
    "reconstructed": lambda: recipe("mptq_vit")("W4A4", **FEW).after(AllocateBits, Reconstruct(steps=2)),
    "trained": lambda: recipe("best_thorough")("W4A4", **FEW).changed(Distil, steps=4, checks=2),
}
LATE = ("corrected", "reconstructed", "trained")  # what is before bits are allocated, others show


@pytest.fixture(scope="module")
def traced() -> GraphModule:
    return trace(vit(depth=1), IMAGES[:2])


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def dies(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """Stop the process as soon as it has kept so many new things from now on."""

    def write(file: Path, content: bytes) -> None:
        nonlocal left
        write_file(file, content)
        left -= 1
        if not left:
            raise Killed

    monkeypatch.setattr("fxquant.artefact.cache.write_file", write)


@pytest.fixture
def _every_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, state, *, last=False: save(self, state, last=True))


def outcome(pipeline: Pipeline, traced: GraphModule, cache: Cache) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors of the quantized model; its code, and the journal without times."""
    context = PassContext(IMAGES, batch_size=2, cache=cache, journal=Journal())
    prefix, rest = split(pipeline)
    quantized = rest.run(run_prefix(prefix, traced, context), context)
    timed = {"recalled": None, "proof": None}
    notes = [(entry.step, entry.nodes_changed, entry.notes | timed) for entry in context.journal.entries]
    return quantized.state_dict(), [quantized.code, *notes]


@pytest.mark.usefixtures("_every_state_is_kept")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_killed_again_and_again_ends_in_the_same_model(
    name: str, traced: GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = PIPELINES[name]()
    tensors, told = outcome(pipeline, traced, Cache())
    if name in LATE:
        run_prefix(split(pipeline)[0], traced, PassContext(IMAGES, batch_size=2, cache=Cache(tmp_path)))
    kills = 0
    while True:
        dies(monkeypatch, left=2 if name in LATE else 8)
        try:
            found, told_again = outcome(pipeline, traced, Cache(tmp_path))
            break
        except Killed:
            kills += 1
    assert kills >= 2
    assert told_again == told
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.usefixtures("_every_state_is_kept")
def test_no_layer_is_searched_twice_and_parts_go_once_the_whole_is_kept(
    traced: GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []

    def counted(weight_oi: Tensor, *statistics: Any, **options: Any) -> Any:
        searched.append(signature(weight_oi))
        return search_weight(weight_oi, *statistics, **options)

    monkeypatch.setattr("passes.search.search_scales.search_weight", counted)
    prefix, _ = split(recipe("best")("W4A4", **FEW))
    for _ in range(99):
        dies(monkeypatch, left=1)
        try:
            run_prefix(prefix, traced, PassContext(IMAGES, batch_size=2, cache=Cache(tmp_path)))
            break
        except Killed:
            suffixes = [file.suffix for file in tmp_path.iterdir()]
            if ".safetensors" in suffixes:
                break
    assert len(searched) == len(set(searched)) == 6, "the weights of one block, of the patches and of the head"
    assert any(file.suffix == ".part" for file in tmp_path.iterdir())
    (whole,) = tmp_path.glob("*.safetensors")
    whole.unlink()
    dies(monkeypatch, left=0)
    run_prefix(prefix, traced, PassContext(IMAGES, batch_size=2, cache=Cache(tmp_path)))
    assert [file.name for file in tmp_path.iterdir()] == [whole.name]


@pytest.mark.parametrize("name", ["vit", "deit3"])
def test_a_graph_that_was_kept_has_the_same_signature(name: str) -> None:
    """Else a resumed run would not find what the killed one has kept."""
    model, size = ARCHITECTURES[name]()
    x = images(2, size)
    traced = trace(model, x)
    prefix, _ = split(recipe("best")("W4A4", **FEW))
    folded = prefix[: len(prefix) - 2].run(traced, PassContext(x))
    again = searched_from_file(*searched_to_file(folded, traced), traced, facts_of(folded))
    assert again.code == folded.code
    assert signature(again) == signature(folded)
