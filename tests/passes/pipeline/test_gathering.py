"""Sums over images: in one order, from wherever a killed process has stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxquant.artefact.cache import Cache, Kept
from fxquant.errors import CalibrationError
from passes.pipeline.checkpoint import Checkpoint
from passes.pipeline.gathering import SHARDS, in_shards
from tests import ranks_at_work as work
from tests.ranks_at_work import on_ranks


class Sum:
    """A sum in float32, where the order counts, and what was added in brackets."""

    def __init__(self) -> None:
        self.restore({"value/sum": torch.zeros(()), "value/count": torch.zeros(())})

    def update(self, batch: Tensor) -> None:
        self.merge({"value/sum": batch.sum(), "value/count": torch.tensor(float(len(batch)))})

    def state(self) -> dict[str, Tensor]:
        return {"value/sum": self.sum, "value/count": self.count}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.sum, self.count = state["value/sum"], state["value/count"]

    def merge(self, state: dict[str, Tensor]) -> None:
        self.sum, self.count = self.sum + state["value/sum"], self.count + state["value/count"]


class Memory(Checkpoint):
    """Keeps every state that it is offered."""

    def __init__(self) -> None:
        super().__init__(Cache(), "")
        self.kept: Kept | None = None

    def load(self) -> Kept | None:
        return self.kept

    def save(self, state: Callable[[], Kept], *, last: bool = False) -> None:
        texts, tensors = state()
        self.kept = texts, {name: tensor.clone() for name, tensor in tensors.items()}


def gathered(
    images: Tensor, checkpoint: Checkpoint, stop: int | None = None, in_place: bool = False, rounds: int = 1
) -> tuple[Sum, list[int]]:
    """The sum, and the first images of the batches that were gathered; only so many where the process is killed."""
    found, seen = Sum(), []
    settings = "adding", images, images.device, 2, found, checkpoint, lambda count: None
    for first, batch in in_shards(*settings, in_place=in_place, rounds=rounds):
        if len(seen) == stop:
            break
        found.update(batch)
        seen.append(first)
    return found, seen


@pytest.mark.parametrize("stop", [1, 3, 4, 37, 66, 67])
def test_a_killed_process_is_gone_on_from_to_the_same_bits(stop: int) -> None:
    images = torch.randn(2 * 67, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 1e3
    whole, seen = gathered(images, Memory())
    assert seen == list(range(0, 134, 2))
    assert whole.count == 134
    memory = Memory()
    gathered(images, memory, stop)
    resumed, rest = gathered(images, memory)
    assert rest == seen[stop:]
    assert torch.equal(resumed.sum, whole.sum)


@pytest.mark.parametrize("stop", [1, 5, 7, 13])
def test_images_are_given_round_after_round_also_after_a_kill(stop: int) -> None:
    images = torch.randn(10, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 1e3
    whole, seen = gathered(images, Memory(), rounds=3)
    assert seen == list(range(0, 30, 2)), "indices go on"
    assert whole.count == 30
    memory = Memory()
    gathered(images, memory, stop, rounds=3)
    resumed, rest = gathered(images, memory, rounds=3)
    assert rest == seen[stop:]
    assert torch.equal(resumed.sum, whole.sum)


@pytest.mark.quick
def test_shards_are_added_in_the_order_of_the_images() -> None:
    images = torch.randn(4 * SHARDS, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 1e3
    expected = torch.zeros(())
    for shard in images.split(4):
        expected = expected + (shard[:2].sum() + shard[2:].sum())
    assert torch.equal(gathered(images, Memory())[0].sum, expected)


def test_a_shard_of_one_batch_is_added_in_place_to_the_same_bits() -> None:
    images = torch.randn(2 * SHARDS, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 1e3
    whole, _ = gathered(images, Memory())
    found, seen = Sum(), 0
    for first, batch in in_shards(
        "adding", images, images.device, 2, found, Memory(), lambda count: None, in_place=True
    ):
        assert found.count == first, "the statistics are those of a part only"
        found.update(batch)
        seen += 1
    assert seen == SHARDS
    assert torch.equal(found.sum, whole.sum)
    memory = Memory()
    gathered(images, memory, 3, in_place=True)
    assert torch.equal(gathered(images, memory, in_place=True)[0].sum, whole.sum)


@pytest.mark.parametrize(
    ("count", "useless", "left"), [(2, 7, [[6, 7, 9, 10], [8, 11, 12]]), (4, 11, [[6, 7], [8], [9, 10], [11, 12]])]
)
def test_owners_go_on_where_they_were(count: int, useless: int, left: list[list[int]], tmp_path: Path) -> None:
    images = torch.randn(13, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 1e3
    _, expected = work.sums_of(images, Cache())
    cache = tmp_path / "cache"
    found = rerun(count, images, [cache] * count, useless, tmp_path, lambda: None)
    assert [seen for seen, _ in found] == left
    assert {name: value for _, sums in found for name, value in sums.items()} == expected


@pytest.mark.parametrize("other", ["nothing", "another point"])
def test_ranks_begin_anew_together_where_their_parts_are_no_one_total(other: str, tmp_path: Path) -> None:
    images = torch.randn(13, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 1e3
    _, expected = work.sums_of(images, Cache())
    folders = [tmp_path / "one machine", tmp_path / "another"]

    def change() -> None:
        (part,) = folders[1].iterdir()
        part.unlink()
        if other == "another point":
            on_ranks(2, tmp_path / "earlier", work.sums_on_ranks, images, [tmp_path / "spare", folders[1]], 5)

    found = rerun(2, images, folders, 9, tmp_path, change)
    assert sorted(found[0][0] + found[1][0]) == list(range(13))
    assert {name: value for _, sums in found for name, value in sums.items()} == expected


def rerun(
    count: int, images: Tensor, folders: list[Path], useless: int, place: Path, change: Callable[[], None]
) -> list[tuple[list[int], dict[str, Tensor]]]:
    """What ranks find that take the place of others, which met a useless image; before that something is changed."""
    for name in ("first", "earlier", "second"):
        (place / name).mkdir()
    for error in on_ranks(count, place / "first", work.sums_on_ranks, images, folders, useless):
        assert isinstance(error, CalibrationError)
    change()
    return on_ranks(count, place / "second", work.sums_on_ranks, images, folders, None)
