"""The processes of a torch.distributed group, and how they talk: every exchange says where each is, and who has failed.

Values are pickled and go through the memory of the hosts, by a gloo group of our own beside the caller's. What ranks
share out, and by which verbs: `fxquant.ranks`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fxquant.errors import DistributedError, LostRankError
from fxquant.messages import REMEDY, error_from_bytes, error_to_bytes, from_bytes, to_bytes

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST_PLACE = 103
_HEAD = f"<?Q{_LONGEST_PLACE}s"  # whether the rank has failed, the size of what it sends, and where it is


class Team:
    """The ranks that work together, and what they say to each other.

    Args:
        arrival_s: seconds that a rank waits for the others to begin.
        patience_s: seconds that a rank waits for another that works.

    Raises DistributedError where not all ranks come.
    """

    def __init__(self, arrival_s: float, patience_s: float) -> None:
        import torch.distributed as dist

        self._groups: list[Any] = []
        self._patience_s = patience_s
        try:
            # Made only once all ranks are here, so this one waits no longer than for their arrival.
            self._groups.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=arrival_s)))
            self._groups.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=patience_s)))
        except RuntimeError as error:
            self.close()
            raise DistributedError(
                f"not all {dist.get_world_size()} ranks of the process group came within {arrival_s:g} s ({error}): "
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

    def hand_over(self, where: str, shares: Sequence[Any]) -> list[Any]:
        """What every rank hands over to this one, in their order; raises as `exchange`.

        where: the place in the program. shares: what this rank hands over to each, in the order of ranks.
        """
        import torch
        import torch.distributed as dist

        group = self._groups[-1]
        contents = {rank: to_bytes(share) for rank, share in enumerate(shares) if rank != self.number}
        sizes = self.exchange(where, {rank: len(content) for rank, content in contents.items()})
        buffers = {rank: bytearray(sizes[rank][self.number]) for rank in contents}

        def trade() -> None:
            under_way = []
            for rank, buffer in buffers.items():
                under_way.append(dist.irecv(torch.frombuffer(buffer, dtype=torch.uint8), group_src=rank, group=group))
            for rank, content in contents.items():
                sent = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                under_way.append(dist.isend(sent, group_dst=rank, group=group))
            for each in under_way:
                if each is not None:
                    each.wait()

        self._guarded(trade)
        return [share if rank == self.number else from_bytes(buffers[rank]) for rank, share in enumerate(shares)]

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
                f"{self._patience_s:g} s ({str(error).splitlines()[0]}): see what that one said last, and {REMEDY}"
            ) from error
