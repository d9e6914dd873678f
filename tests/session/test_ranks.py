"""Ranks of a process group that share the work out: the same result, bit for bit, and one error where one fails."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxquant import ranks
from fxquant.data import embedded
from fxquant.data.images import embedded_test
from fxquant.errors import CalibrationError, DistributedError, LostRankError
from fxquant.measure.accuracy import evaluate
from passes.search.search_scales import SearchScales
from tests import ranks_at_work as work
from tests.ranks_at_work import compiled, made, on_ranks


@pytest.mark.parametrize(
    ("count", "recipes"), [(2, ("best", "mix_qvit", "short training", "reconstructed")), (4, ("short training",))]
)
def test_any_number_of_ranks_gives_the_same_model(count: int, recipes: tuple[str, ...], tmp_path: Path) -> None:
    expected = [(made(compiled(recipe)), {"ranks": count}) for recipe in recipes]
    assert on_ranks(count, tmp_path, work.results, *recipes) == [expected] * count


def test_each_item_is_done_by_one_rank_and_known_to_all_in_order(tmp_path: Path) -> None:
    results = on_ranks(3, tmp_path, work.share_out)
    assert [found for found, *_ in results] == [list("ABCDEFG")] * 3
    assert [mine for _, mine, *_ in results] == ["abf", "cd", "eg"]
    assert len({process for *_, process, _ in results}) == 1
    assert [values for *_, values in results] == [[0.5, 1.5, 2.5]] * 3


def test_sums_have_their_brackets_whatever_the_ranks(tmp_path: Path) -> None:
    """Of three ranks two add up halves of four micro-batches; each has what the others hand over to it."""
    halves = (work.gradient(0) + work.gradient(1)) + (work.gradient(2) + work.gradient(3))
    assert not torch.equal(halves, ((work.gradient(0) + work.gradient(1)) + work.gradient(2)) + work.gradient(3)), (
        "brackets count"
    )
    results = on_ranks(3, tmp_path, work.add_up)
    assert [done for _, done, _ in results] == [[0, 1], [2, 3], []]
    assert all(torch.equal(total, halves) for (total, _), *_ in results)
    assert all(absent is None for (_, absent), *_ in results)
    assert [handed for *_, handed in results] == [["0 to 0", "1 to 0", "2 to 0"], *(
        [f"{source} to {rank}" for source in range(3)] for rank in (1, 2)
    )]  # fmt: skip


def test_statistics_are_with_their_owners(tmp_path: Path) -> None:
    """Each Gram matrix is on one rank, both have some; who leaves the others is told, and the file has all of them."""
    (grams, error), (others, _) = on_ranks(2, tmp_path, work.calibrate_and_leave, tmp_path / "cache")
    assert not set(grams) & set(others)
    assert min(len(grams), len(others)) > 1
    assert isinstance(error, DistributedError)
    assert "with rank 1 alone" in str(error)
    resumed = compiled(cache=tmp_path / "cache")
    assert resumed.journal.entries[0].notes["recalled"]
    assert made(resumed) == made(compiled())


def test_on_devices_ranks_give_what_one_process_gives_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # the stand-in trains in float32
    assert on_ranks(2, tmp_path, work.on_devices) == [made(work.trained_on("cpu"))] * 2


def test_batches_to_evaluate_are_shared_out(tmp_path: Path) -> None:
    alone = evaluate(embedded.load_model(), embedded_test(), batch_size=4, limit=24)
    # Every rank reads the first image too, to see what the model gives.
    assert on_ranks(2, tmp_path, work.accuracy) == [(alone.correct, 24, 13)] * 2


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (work.other_images, DistributedError, "the calibration images of rank 1 and of rank 0 are not the same"),
        (work.fail_on_the_last, CalibrationError, "an image of rank 1 is of no use"),
        (work.elsewhere, DistributedError, "rank 0 is at 'adding' and rank 1 at 'counting'"),
    ],
)
def test_all_ranks_raise_the_same(function: Any, kind: type[Exception], message: str, tmp_path: Path) -> None:
    for error in on_ranks(2, tmp_path, function):
        assert isinstance(error, kind)
        assert message in str(error)


def test_a_rank_that_dies_ends_the_others_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while scales are searched; what was finished before that is not done again, by any number of ranks."""
    cache = tmp_path / "cache"
    error, dead = on_ranks(2, tmp_path, work.die_while_searching, cache)
    assert dead is None
    assert isinstance(error, LostRankError)
    assert "rank 0 of 2 has lost another rank" in str(error)
    assert list(cache.glob("*.part"))
    assert not list(cache.glob(".*.partial"))
    searched = []
    original = SearchScales._searched

    def counted(*arguments: Any) -> Any:
        searched.append(1)
        return original(*arguments)

    monkeypatch.setattr(SearchScales, "_searched", counted)
    resumed, left = made(compiled(cache=cache)), len(searched)
    assert resumed == made(compiled())
    assert left < (len(searched) - left) * 0.75, "the first rank had its share"


@pytest.mark.parametrize(
    ("count", "dies_at", "left"), [(2, 3, [[2, 4], [3]]), (4, 4, [[4], [], [], []])], ids=["two", "four"]
)
def test_ranks_that_take_the_place_of_killed_ones_calibrate_with_the_images_that_are_left(
    count: int, dies_at: int, left: list[list[int]], tmp_path: Path
) -> None:
    """Of five images; each has a folder of its own, in which no part of the searched graph is left in the end."""
    folders = [tmp_path / f"cache {rank}" for rank in range(count)]
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
    killed = on_ranks(count, tmp_path / "first", work.compiled_with_every_state_kept, folders, dies_at)
    assert killed.count(None) == 1
    assert all(list(folder.glob("*.*.part")) for folder in folders)
    assert sum(isinstance(error, LostRankError) for error in killed) == count - 1
    found = on_ranks(count, tmp_path / "second", work.compiled_with_every_state_kept, folders)
    assert found == [(made(compiled("without views")), seen) for seen in left]
    assert not [file for folder in folders for file in folder.glob("*.*.part")]


def test_a_rank_that_does_not_come_is_waited_for_a_while(tmp_path: Path) -> None:
    error, _ = on_ranks(2, tmp_path, work.stay_away)
    assert isinstance(error, DistributedError)
    assert "not all 2 ranks of the process group came within 1 s" in str(error)


def test_one_rank_can_work_alone(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path, work.first_alone) == [(1, True), None]


@pytest.mark.quick
def test_without_a_process_group_everything_is_done_here() -> None:
    with ranks.together(lambda: pytest.fail("there is nobody to compare with")):
        assert ranks.count() == 1
        assert ranks.is_first()
        assert ranks.card() == {}
        shown: list[int] = []
        assert ranks.dealt("doubling", lambda value: 2 * value, [1, 2, 3], advance=shown.append) == [2, 4, 6]
        assert shown == [1, 1, 1]
        assert ranks.once("asking", lambda: 7) == 7
        assert ranks.from_all("telling", "here") == ["here"]


def test_threads_that_take_turns_leave_nobody_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread deals out makes neither another thread alone, nor the process for good."""
    monkeypatch.setattr(ranks, "_team", SimpleNamespace(number=1, count=2))
    inside, over = threading.Event(), threading.Event()

    def first() -> None:
        with ranks.alone():
            inside.set()
            over.wait(10)

    def last() -> int:
        inside.wait(10)
        before = ranks.count()
        with ranks.alone():
            over.set()
            thread.join(10)
        return before

    thread = threading.Thread(target=first)
    thread.start()
    assert last() == 2
    assert (ranks.count(), ranks.number()) == (2, 1)
