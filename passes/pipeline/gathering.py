"""Statistics over the calibration images, summed in one order whatever the number of ranks that share the images.

    total = ((shard 0 + shard 1) + shard 2) + ...        a shard: some consecutive images, gathered by one rank

Sums of floating-point numbers depend on how they are put in brackets. So the images are cut into shards, of which the
number of ranks knows nothing: each is gathered from zero by one rank, image by image, and added to the total in the
order of the images, on every rank, or piece by piece on the rank that owns the piece. One process alone does the same.
The price is the memory of a second set of statistics; a process alone does without it for a shard of one batch, where
the statistics promise that the batch adds to the total what it would have given from zero. There are `SHARDS` shards,
or more where they would be longer than `LONGEST` images; so many ranks at most have something to do.

A process alone keeps its state while it gathers. Several ranks do so where they meet, when each has added a shard: the
first keeps the total, or each owner the pieces that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Protocol

import torch
from torch import Tensor

from fxquant import ranks
from fxquant.artefact.cache import Kept
from passes.pipeline.checkpoint import Checkpoint

SHARDS = 8
LONGEST = 64
SENT_TOGETHER = 16  # pieces of a state
_IMAGES_SEEN, _TOTAL, _PART = "images seen", "total/", "part/"  # among the tensors of a state

State = dict[str, Tensor]


class Gathered(Protocol):
    """What a pass gathers over the calibration images, in a form that can be kept and added up.

    Names of a state that are alike up to the first "/" are one piece; pieces are sent and merged one by one.
    """

    def state(self) -> State:
        """All that going on from here depends on."""

    def restore(self, state: State) -> None:
        """Go back to a state, whose tensors may change from then on."""

    def merge(self, state: State) -> None:
        """Add what was gathered of the images that follow: some pieces of a state, each of them whole."""


def in_shards(
    label: str,
    images_bchw: Tensor,
    device: torch.device,
    together: int,
    gathered: Gathered,
    checkpoint: Checkpoint,
    advance: Callable[[int], None],
    *,
    in_place: bool = False,
    owners: Sequence[int] | None = None,
    rounds: int = 1,
) -> Iterator[tuple[int, Tensor]]:
    """Batches of images for this rank to gather from, with the index of the first image of each; see the module.

    At the end `gathered` holds the statistics of all images, on every rank; or there those of the pieces that it owns,
    and of the others what it has held before the first image.

    Args:
        label: what is gathered, for errors.
        images_bchw: all images.
        device: where batches are given and statistics are.
        together: images of a batch.
        gathered: as it is before the first image; what it holds then is not of images, and is the same on all ranks.
        checkpoint: keeps the state between batches, or, of several ranks, between rounds of shards.
        advance: told how many more images are done.
        in_place: whether a batch may be added to the total at once: it changes that by the same bits as merging what
            the batch gives from zero does.
        owners: of every piece, whose name is its number, the rank that alone adds it up; None: all do.
        rounds: how often the images are given, one after another each time; indices go on.
    """
    shards = _shards(images_bchw, together, rounds)
    start = gathered.state()
    _, loaded = checkpoint.load() or ({}, {})
    kept = {name: tensor.to(device) for name, tensor in loaded.items()}
    seen = int(kept.get(_IMAGES_SEEN, torch.tensor(0)))
    if owners is not None and len(set(ranks.from_all(label, seen))) > 1:  # what the ranks have kept is no one total
        kept, seen = {}, 0
    total, part = _own(start), _under(_PART, kept)
    if kept:
        owned = _owned(total, owners).keys()
        total = {name: tensor for name, tensor in total.items() if name not in owned} | _under(_TOTAL, kept)
    advance(seen)
    first = next((number for number, shard in enumerate(shards) if _end(shard) > seen), len(shards))
    while first < len(shards):
        taken = shards[first : first + ranks.count()]
        mine = taken[ranks.number()] if ranks.number() < len(taken) else []
        is_added = in_place and ranks.count() == 1 and len(mine) == 1
        # Of a shard that a killed process had begun, the first rank has what that one had gathered.
        begun = part if part and ranks.number() == 0 else _own(start)
        gathered.restore(total if is_added else begun)
        done = seen
        for index, batch in mine:
            if index >= seen:
                yield index, batch.to(device)
                done += len(batch)
                advance(len(batch))
                if ranks.count() == 1 and done < _end(mine):
                    checkpoint.save(partial(_kept, done, total, gathered))
        if not is_added:
            part = gathered.state()
            gathered.restore(total)
            _merge(label, gathered, part, len(taken), device, owners)
        total, part, end = gathered.state(), {}, _end(taken[-1])
        advance(end - done)
        first, seen = first + len(taken), end
        checkpoint.save(partial(_kept, seen, _owned(total, owners)))
    gathered.restore(total)  # also where a killed process had seen all images


def _merge(
    label: str, gathered: Gathered, part: State, count: int, device: torch.device, owners: Sequence[int] | None
) -> None:
    """Merge what the first ranks have gathered, some pieces at a time: only so many of others are held.

    Args:
        label: what is gathered, for errors.
        gathered: what is merged into.
        part: what this rank has gathered.
        count: of how many ranks.
        device: where the statistics are.
        owners: of every piece, see `in_shards`.
    """
    pieces = {piece: list(names) for piece, names in groupby(part, key=lambda name: name.partition("/")[0])}
    every = list(dict.fromkeys(chain(*ranks.from_all(label, list(pieces)))))

    def of(chosen: Iterable[str]) -> State:
        return {name: part[name] for piece in chosen for name in pieces.get(piece, [])}

    for at in range(0, len(every), SENT_TOGETHER):
        some = every[at : at + SENT_TOGETHER]
        if owners is None:
            found = ranks.from_all(label, of(some))
        else:
            owned = [[piece for piece in some if owners[int(piece)] == rank] for rank in range(ranks.count())]
            found = ranks.handed_over(label, [of(each) for each in owned])
        for state in found[:count]:
            gathered.merge({name: tensor.to(device) for name, tensor in state.items()})


def _owned(state: State, owners: Sequence[int] | None) -> State:
    """The pieces of a state that this rank adds up. owners: see `in_shards`."""
    return {
        name: tensor
        for name, tensor in state.items()
        if owners is None or owners[int(name.partition("/")[0])] == ranks.number()
    }


def _shards(images_bchw: Tensor, together: int, rounds: int) -> list[list[tuple[int, Tensor]]]:
    """Batches with the index of their first image, in lists of nearly equal length."""
    images = len(images_bchw)
    once = [(index * together, batch) for index, batch in enumerate(torch.split(images_bchw, together))]
    batches = [(done * images + index, batch) for done in range(rounds) for index, batch in once]
    count = min(max(SHARDS, -(-images * rounds // LONGEST)), len(batches))
    ends = [len(batches) * (number + 1) // count for number in range(count)]
    return [batches[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _end(shard: list[tuple[int, Tensor]]) -> int:
    """Images up to the end of a shard."""
    index, batch = shard[-1]
    return index + len(batch)


def _own(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def _under(prefix: str, kept: State) -> State:
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in kept.items() if name.startswith(prefix)}


def _kept(seen: int, total: State, part: Gathered | None = None) -> Kept:
    """What a checkpoint keeps. part: what is gathered of a shard that has begun."""
    found = {_TOTAL + name: tensor for name, tensor in total.items()}
    if part is not None:
        found |= {_PART + name: tensor for name, tensor in part.state().items()}
    return {}, {**found, _IMAGES_SEEN: torch.tensor(seen)}
