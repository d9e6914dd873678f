"""Work shared out over the ranks of a torch.distributed process group. Without a group, every verb is an identity.

    with together(given):                                   # every rank enters, and was given the same
        scores = dealt("scoring layers", score, layers)     # each rank scores some; all get all, in the layers' order
        bits = once("allocating bits", solve)               # rank 0 solves; all get its answer
        for part in from_all("calibrating", sums): ...      # what each rank has, in the order of ranks

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
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from fxquant.errors import DistributedError, LostRankError
from fxquant.messages import REMEDY, error_from_bytes, error_to_bytes, from_bytes, to_bytes

if TYPE_CHECKING:
    from torch import Tensor

ARRIVAL_S = 600.0
"""Seconds that a rank waits for the others to begin."""

PATIENCE_S = 7200.0
"""Seconds that a rank waits for another that works, and that has not died."""

_LONGEST_PLACE = 103
_HEAD = f"<?Q{_LONGEST_PLACE}s"  # whether the rank has failed, the size of what it sends, and where it is

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Ranks:
    """The ranks that work together, and what they say to each other."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._groups: list[Any] = []
        try:
            # Made only once all ranks are here, so this one waits no longer than for their arrival.
            self._groups.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=ARRIVAL_S)))
            self._groups.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_S)))
        except RuntimeError as error:
            self.close()
            raise DistributedError(
                f"not all {dist.get_world_size()} ranks of the process group came within {ARRIVAL_S:g} s ({error}): "
                f"make the same call on every rank, or, to work on one of them alone, make it `with "
                f"fxquant.ranks.alone():`"
            ) from error
        self.number, self.count, self.has_failed = dist.get_rank(), dist.get_world_size(), False

    def close(self) -> None:
        """Close the connections, which also wakes ranks that wait for this one."""
        import torch.distributed as dist

        with suppress(RuntimeError, ValueError, AssertionError):  # the caller may have ended the process group
            for group in self._groups:
                dist.destroy_process_group(group)

    def exchange(self, where: str, value: Any = None, error: Exception | None = None) -> list[Any]:
        """The values of all ranks, in their order; raises on each where one has failed, or is not at the same place.

        Args:
            where: the place in the program.
            value: of this rank.
            error: what has failed on this rank.
        """
        content = to_bytes(value) if error is None else error_to_bytes(error)
        head = struct.pack(_HEAD, error is not None, len(content), where.encode()[:_LONGEST_PLACE])
        heads = [struct.unpack(_HEAD, each) for each in self._heads(head)]
        failed = next((rank for rank, (has_failed, *_) in enumerate(heads) if has_failed), None)
        if failed is not None:
            self.has_failed = True
            found = self._sent(content, heads[failed][1], failed)
            raise error or error_from_bytes(found, failed)
        places = [place.rstrip(b"\0").decode(errors="replace") for *_, place in heads]
        for rank, other in enumerate(places):
            if other != places[0]:
                self.has_failed = True
                raise DistributedError(
                    f"the ranks do not run the same program: rank 0 is at '{places[0]}' and rank {rank} at '{other}'; "
                    f"make the same calls with the same arguments on every rank"
                )
        sent = (self._sent(content, size, source) for source, (_, size, _) in enumerate(heads))
        return [value if source == self.number else from_bytes(each) for source, each in enumerate(sent)]

    def _sent(self, content: bytes, size: int, source: int) -> bytearray:
        """What one rank sends to all. content: what this one would send. size: of what that one does."""
        import torch

        buffer = bytearray(content) if source == self.number else bytearray(size)
        self._broadcast(torch.frombuffer(buffer, dtype=torch.uint8), source)
        return buffer

    def _heads(self, head: bytes) -> list[bytes]:
        import torch
        import torch.distributed as dist

        mine = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.count)]
        self._guarded(lambda: dist.all_gather(found, mine, group=self._groups[-1]))
        return [each.numpy().tobytes() for each in found]

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        import torch.distributed as dist

        self._guarded(lambda: dist.broadcast(tensor, group_src=source, group=self._groups[-1]))

    def _guarded(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            self.has_failed = True
            raise LostRankError(
                f"rank {self.number} of {self.count} has lost another rank, which has died or did not answer within "
                f"{PATIENCE_S:g} s ({str(error).splitlines()[0]}): see what that one said last, and {REMEDY}"
            ) from error


_team: _Ranks | None = None
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
    team = _team = _Ranks()
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
) -> list[Result]:
    """The results for all items, in their order, on every rank; each item's is computed by one rank.

    Args:
        label: what is done, for errors.
        function: what one item gives; it must not change what other items, or the ranks, go on with.
        items: the same on every rank. A rank does its own in their order.
        costs: how long each takes, in any unit, so that all ranks have about as much to do; None: all alike.
        advance: told how many more are done, of which there are `len(items)` in all.

    Raises on every rank what `function` raises on one.
    """
    owners = _owners(costs or [1.0] * len(items), count())
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


def _owners(costs: Sequence[float], ranks: int) -> list[int]:
    """Of each item the rank that does it: the costliest first, always to the rank with least to do."""
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
