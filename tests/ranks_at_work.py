"""Ranks of a process group for tests, and what they do. They are forks of one process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fxquant
from fxquant import ranks
from fxquant.artefact.cache import Cache, Kept, signature
from fxquant.data import embedded
from fxquant.data.images import ImageData, embedded_test
from fxquant.errors import CalibrationError, DistributedError
from fxquant.measure.accuracy import evaluate
from fxquant.quantizers.observers import Observer
from fxquant.session.compiled import Compiled
from fxquant.session.session import Session
from passes.correct.correct_weights import CorrectWeights
from passes.correct.distil import Distil
from passes.correct.micro_batches import summed
from passes.correct.reconstruct import Reconstruct
from passes.pipeline.checkpoint import Checkpoint
from passes.pipeline.gathering import in_shards
from passes.pipeline.pipeline import Pipeline
from passes.recipes import RECIPES
from passes.search.calibrate import Calibrate
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers
from tests.models import images, vit
from tests.stand_in_device import stand_in

PATIENCE_S = 120.0
IMAGES = images(5)


def on_ranks(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of this module returns or raises on each rank; None where the process has died.

    Args:
        count: how many ranks.
        folder: where they find each other; of this call alone.
        function: called with the number of the rank, in a process group.
        arguments: further ones.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    pipes = [processes.Pipe(duplex=False) for _ in range(count)]
    place = f"file://{folder}/ranks"
    started = [
        processes.Process(target=_run, args=(rank, count, place, pipes[rank][1], function, arguments))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for _, end in pipes:
        end.close()
    results: list[Any] = []
    for (reading, _), process in zip(pipes, started, strict=True):
        try:
            results.append(pickle.loads(reading.recv_bytes()) if reading.poll(PATIENCE_S) else None)
        except EOFError:
            results.append(None)
        process.join(5)
        process.kill()
    return results


def _run(rank: int, count: int, place: str, result: Any, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", place, rank=rank, world_size=count)
        found = function(rank, *arguments)
        if dist.is_initialized():
            dist.barrier()  # the first, which keeps the store, ends last
    except Exception as error:
        found = error
    result.send_bytes(pickle.dumps(found))
    os._exit(0)  # the group may be broken, and would be waited for


def compiled(recipe: str = "best", **options: Any) -> Compiled:
    """A model of one block; "short training" is `best_thorough` with four steps, "reconstructed" learns two a block,
    "without views" is `best` on images alone."""
    own = {"short training": short_training, "reconstructed": reconstructed, "without views": without_views}
    options["recipe"] = own.get(recipe, recipe)
    return fxquant.compile(vit(depth=1), "W4A4", calibration=IMAGES, bits=(3, 4, 6), progress=False, **options)


def short_training(*arguments: Any, **options: Any) -> Pipeline:
    return RECIPES["best_thorough"](*arguments, **options).changed(Distil, steps=4, images=4, micro_batches=4, checks=2)


def without_views(*arguments: Any, **options: Any) -> Pipeline:
    return RECIPES["best"](*arguments, **options).changed(Calibrate, views=None)


def reconstructed(*arguments: Any, **options: Any) -> Pipeline:
    learned = Reconstruct(steps=2, images=3, micro_batches=2, checks=1, loss="fisher")
    return RECIPES["naive_min_max"](*arguments, **options).before(SubstituteQuantizers, learned)


def made(compiled: Compiled) -> tuple[Any, ...]:
    """All of a result but times, and on how many ranks it was made."""
    state = [[name, value] for name, value in sorted(compiled.state_dict().items()) if isinstance(value, torch.Tensor)]
    losses = [entry.notes["predicted_loss"] for entry in compiled.journal.entries if "predicted_loss" in entry.notes]
    card = {name: value for name, value in compiled.card.items() if name != "distributed"}
    assert compiled.answers is not None
    return signature(state), repr(compiled.layers), card, losses, signature(compiled.answers.simulated)


def results(rank: int, *recipes: str) -> list[Any]:
    return [(made(found), found.card["distributed"]) for found in map(compiled, recipes)]


def share_out(rank: int) -> list[Any]:
    """Results, what this rank did, a process of rank 0, and a tensor of each."""
    with ranks.together(lambda: {"weather": "fine"}):
        mine: list[str] = []

        def upper(text: str) -> str:
            assert ranks.count() == 1, "inside, the process is alone"
            mine.append(text)
            return text.upper()

        assert (ranks.count(), ranks.number(), ranks.is_first()) == (3, rank, rank == 0)
        found = ranks.dealt("shouting", upper, "abcdefg", [9, 1, 1, 9, 1, 1, 9])
        tensors = ranks.from_all("telling", torch.full((2,), rank + 0.5, dtype=torch.bfloat16)[:1])
        return [found, "".join(mine), ranks.once("asking", os.getpid), torch.cat(tensors).tolist()]


def gradient(index: int) -> torch.Tensor:
    """A gradient whose sums depend on brackets."""
    return torch.rand(99, generator=torch.Generator().manual_seed(index)) / 3**index


def add_up(rank: int) -> tuple[list[torch.Tensor | None], list[int], list[str]]:
    """A sum over four micro-batches, which of them this rank has computed, and what is handed over to it."""
    done: list[int] = []

    def gradients_of(index: int) -> list[torch.Tensor | None]:
        done.append(index)
        return [gradient(index), None]

    with ranks.together(dict):
        found = summed("adding", gradients_of, 4)
        return found, done, ranks.handed_over("handing over", [f"{rank} to {other}" for other in range(3)])


def calibrate_and_leave(rank: int, cache: Path) -> tuple[list[str], Exception | None]:
    """Names of the observers whose Gram matrices this rank has, and what rounding raises without the other."""
    session = Session(vit(depth=1), IMAGES, bits=(3, 4, 6), cache=cache, progress=False)
    graph_module = session.searched()
    named = graph_module.named_modules()
    found = [name for name, module in named if isinstance(module, Observer) and module.gram is not None]
    try:
        with ranks.alone():
            session.compile("W4A4")
    except DistributedError as error:
        return found, error
    return found, None


def trained_on(device: Any) -> Compiled:
    """By a closed form and one step, on two images: what a rank is given by another has to come to its device."""
    closed_form = CorrectWeights(ridges=(1.0,), rounding="nearest")
    learned = Distil(steps=1, images=2, micro_batches=2, checks=1, closed_form=closed_form)
    pipeline = RECIPES["naive_min_max"]("W4A4", bits=(4, 8)).before(SubstituteQuantizers, learned)
    return fxquant.compile(vit(depth=1).to(device), None, calibration=IMAGES[:2], recipe=pipeline, progress=False)


def on_devices(rank: int) -> tuple[Any, ...]:
    torch.cpu._is_avx512_bf16_supported = lambda: False
    return made(trained_on(stand_in()).cpu())


def accuracy(rank: int) -> tuple[int, int, int]:
    """Correct, all, and how many images this rank has read."""
    whole = embedded_test()
    seen: list[int] = []

    def read(index: int) -> torch.Tensor:
        seen.append(index)
        return whole.read(index)

    data = ImageData(**{**vars(whole), "read": read})
    found = evaluate(embedded.load_model(), data, batch_size=4, limit=24)
    return found.correct, found.count, len(seen)


def other_images(rank: int) -> Compiled:
    return fxquant.compile(vit(depth=1), "W4A4", calibration=IMAGES + rank)


def fail_on_the_last(rank: int) -> Compiled:
    def fail(*arguments: Any) -> None:
        raise CalibrationError("an image of rank 1 is of no use")

    if rank == 1:
        Calibrate._gradients = fail  # type: ignore[assignment]
    return compiled()


def elsewhere(rank: int) -> list[int]:
    with ranks.together(dict):
        return ranks.dealt("counting" if rank else "adding", abs, [1, 2])


def die_while_searching(rank: int, cache: Path) -> Compiled:
    if rank == 1:
        SearchScales._activation = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]
    return compiled(cache=cache)


save = Checkpoint.save


class Eager(Checkpoint):
    """Keeps every state that it is offered."""

    def save(self, state: Callable[[], Kept], *, last: bool = False) -> None:
        save(self, state, last=True)


class Sums:
    """Two sums in float32, where the order counts; each is one piece of the state."""

    def __init__(self) -> None:
        self.sums = {"0/sum": torch.zeros(()), "1/sum": torch.zeros(())}

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.sums)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.sums = dict(state)

    def merge(self, state: dict[str, torch.Tensor]) -> None:
        self.sums |= {name: self.sums[name] + tensor for name, tensor in state.items()}


def sums_of(
    images: torch.Tensor, cache: Cache, useless: int | None = None, owners: list[int] | None = None
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The images that this process has seen, and the sums that it has in the end; the useless image is an error."""
    found, seen = Sums(), []
    checkpoint = Eager(cache, signature("sums"), of_each=owners is not None)
    for first, batch in in_shards(
        "adding", images, images.device, 1, found, checkpoint, lambda count: None, owners=owners
    ):
        if first == useless:
            raise CalibrationError(f"image {first} is of no use")
        found.merge({"0/sum": batch.sum(), "1/sum": batch.square().sum()})
        seen.append(first)
    return seen, found.state()


def sums_on_ranks(
    rank: int, images: torch.Tensor, folders: list[Path], useless: int | None
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """`sums_of` of ranks of which the first and the last own a sum each; the rest of what they return is empty."""
    with ranks.together(dict):
        owners = [0, ranks.count() - 1]
        seen, state = sums_of(images, Cache(folders[rank]), useless, owners)
        return seen, {name: value for name, value in state.items() if owners[int(name[0])] == rank}


def compiled_with_every_state_kept(rank: int, folders: list[Path], dies_at: int | None = None) -> tuple[Any, list[int]]:
    """A result, and the images that this rank has calibrated with; where it is given that image, it is killed."""
    seen: list[int] = []
    gradients = Calibrate._gradients

    def counted(*arguments: Any) -> Any:
        seen.append(arguments[-1].first)
        if seen[-1] == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return gradients(*arguments)

    Calibrate._gradients = counted  # type: ignore[method-assign]
    Checkpoint.save = Eager.save  # type: ignore[method-assign]
    return made(compiled("without views", cache=folders[rank])), seen


def stay_away(rank: int) -> None:
    ranks.ARRIVAL_S = 1.0
    if rank == 0:
        compiled()


def first_alone(rank: int) -> tuple[int, bool] | None:
    if rank:
        return None
    with ranks.alone(), ranks.together(lambda: pytest.fail("there is nobody to compare with")):
        return ranks.count(), ranks.is_first()


def run_command(rank: int, folder: Path, port: int, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, as torchrun would start it."""
    from fxquant.cli import main

    world = dist.get_world_size()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    places = [folder / f"{name}.{rank}" for name in ("stdout", "stderr")]
    for place, stream in zip(places, (1, 2), strict=True):
        os.dup2(os.open(place, os.O_CREAT | os.O_WRONLY), stream)
    sys.argv = ["fxquant", *arguments]
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    return code or 0, places[0].read_text(), places[1].read_text()
