"""Work shared out over the ranks of a torch.distributed process group. Without a group, every verb is an identity.

    with together(given):                                   # every rank enters, and was given the same
        scores = dealt("scoring layers", score, layers)     # each rank scores some; all get all, in the layers' order
        bits = once("allocating bits", solve)               # rank 0 solves; all get its answer
        for part in from_all("calibrating", sums): ...      # what each rank has, in the order of ranks
        for part in handed_over("calibrating", shares): ... # the share of each rank that is meant for this one

All ranks run the same program and hold the same state; only what is dealt out runs on one of them, and inside it that
process is alone: `count()` is 1, and nothing inside waits for others. So a result may depend on how the work is cut
into items, and never on how many ranks there are.

The ranks meet at the verbs. Before values are exchanged each says where it is and whether it has failed: an error of
one becomes the same error of all. A process that died closes its connections, which the others notice at once; a
machine that vanished, after `PATIENCE_S`. Values go through the memory of the hosts by a gloo group of our own, beside
the caller's group whatever its backend: pickled, between processes that run one program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

from fxquant.errors import DistributedError
from fxquant.team import Team

ARRIVAL_S = 600.0
"""Seconds that a rank waits for the others to begin."""

PATIENCE_S = 7200.0
"""Seconds that a rank waits for another that works, and that has not died."""

Item = TypeVar("Item")
Result = TypeVar("Result")


_team: Team | None = None
_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)  # each thread has its own
_launched_as = 0  # the rank that torchrun has started this process as


def count() -> int:
    """How many ranks share what is dealt out: 1 outside of `together`, and inside what is dealt out."""
    return 1 if _team is None or _is_alone.get() else _team.count


def number() -> int:
    """This rank's place among those that share what is dealt out, from 0."""
    return 0 if _team is None or _is_alone.get() else _team.number


def is_first() -> bool:
    """Whether this process speaks for all: it shows progress, prints, and writes results."""
    return _launched_as == 0 if _team is None else _team.number == 0


def card() -> dict[str, Any]:
    """For the protocol card: on how many ranks a result was made; nothing outside of `together`."""
    return {} if _team is None else {"distributed": {"ranks": _team.count}}


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this thread waits for no other process and shares nothing out."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


@contextmanager
def together(given: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Inside, the ranks of the process group that this process belongs to share out the work; none: nothing changes.

    given: what has to be the same on every rank, by name, values that can be compared; called where there are several.

    Raises DistributedError where a rank does not come, was given something else, or is lost; on every rank what one of
    them raises.
    """
    global _team
    if _is_alone.get() or not _has_group():
        yield
        return
    if _team is not None:
        _compare(given())
        yield
        return
    team = _team = Team(ARRIVAL_S, PATIENCE_S)
    try:
        _compare(given())
        yield
        team.exchange("the end")
    except Exception as error:
        if not team.has_failed:
            with suppress(Exception):  # the error of this rank is the one to see
                team.exchange("an error", error=error)
        raise
    finally:
        _team = None
        team.close()


def _has_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _compare(given: Mapping[str, Any]) -> None:
    of_ranks = from_all("comparing arguments", dict(given))
    for rank, other in enumerate(of_ranks):
        for name in of_ranks[0]:
            if other.get(name) != of_ranks[0][name]:
                found = f"{of_ranks[0][name]!r:.80} and {other.get(name)!r:.80}"
                raise DistributedError(
                    f"the {name} of rank {rank} and of rank 0 are not the same ({found}): give every rank the same "
                    f"model, images and options"
                )


def dealt(
    label: str,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    costs: Sequence[float] | None = None,
    advance: Callable[[int], None] = lambda units: None,
    owners: Sequence[int] | None = None,
) -> list[Result]:
    """The results for all items, in their order, on every rank; each item's is computed by one rank.

    Tensors that another rank has computed are on the CPU.

    Args:
        label: what is done, for errors.
        function: what one item gives; it must not change what other items, or the ranks, go on with.
        items: the same on every rank. A rank does its own in their order.
        costs: how long each takes, in any unit, so that all ranks have about as much to do; None: all alike.
        advance: told how many more are done, of which there are `len(items)` in all.
        owners: the rank that does each; None: as costs say.

    Raises on every rank what `function` raises on one, and DistributedError for an owner that there is not.
    """
    if owners is None or count() == 1:
        owners = owners_of(costs or [1.0] * len(items), count())
    if any(owner >= count() for owner in owners):
        raise DistributedError(
            f"{label} goes on with what {max(owners) + 1} ranks have made, and there are {count()}: make calls that "
            f"belong together on the same ranks"
        )
    mine = [index for index, owner in enumerate(owners) if owner == number()]
    own: dict[int, Result] = {}
    team = None if count() == 1 else _team
    error = None
    shown = 0
    try:
        with alone():
            for done, index in enumerate(mine, 1):
                own[index] = function(items[index])
                advance(len(items) * done // len(mine) - shown)
                shown = len(items) * done // len(mine)
    except Exception as found:
        if team is None:
            raise
        error = found
    if team is None:
        return [own[index] for index in mine]
    of_ranks = team.exchange(label, own, error)
    return [of_ranks[owner][index] for index, owner in enumerate(owners)]


def once(label: str, make: Callable[[], Result]) -> Result:
    """What `make` returns on rank 0, the only one that runs it. label: what is done, for errors."""
    return dealt(label, lambda _: make(), [None])[0]


def from_all(label: str, value: Result) -> list[Result]:
    """The value of every rank, in the order of ranks, on every rank. label: what is done, for errors."""
    team = None if count() == 1 else _team
    if team is None:
        return [value]
    return team.exchange(label, value)


def handed_over(label: str, shares: Sequence[Result]) -> list[Result]:
    """What every rank hands over to this one, in the order of ranks; tensors are on the CPU.

    label: what is done, for errors. shares: what this rank hands over to each, in the order of ranks.
    """
    team = None if count() == 1 else _team
    return list(shares) if team is None else team.hand_over(label, shares)


def owners_of(costs: Sequence[float], ranks: int) -> list[int]:
    """Of each item the rank that does it: the costliest first, always to the rank with least to do.

    costs: how long each takes, in any unit. ranks: how many there are.
    """
    load, owners = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = min(range(ranks), key=load.__getitem__)
        load[owners[index]] += costs[index]
    return owners


@contextmanager
def launched(given: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a process that torchrun has started works together with the others; any other process works alone.

    given: what has to be the same on every rank, by name. Raises as `together`.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield
        return
    import torch.distributed as dist

    global _launched_as
    _launched_as = int(os.environ["RANK"])
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=ARRIVAL_S))
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}"
        ) from error
    try:
        with together(lambda: given):
            yield
    finally:
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
