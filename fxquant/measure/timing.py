"""How long models take, side by side: every round runs each of them once, so that they share the machine's moods.

A ratio is the median over rounds of (seconds of the first variant / seconds of this one), both from the same round.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.checks.hints import checked
from fxquant.errors import DataError, FxQuantError, OptionError
from fxquant.report.progress import shown
from fxquant.runtime.simulated import QuantizedInput, QuantizedMatmul, QuantizedWeightModule
from passes.pipeline.progress import ProgressReporter

Variant = Callable[[Tensor], Tensor]
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """One variant at one batch size.

    Args:
        variant: the name of what was timed.
        batch_size: images in a batch.
        threads: how many threads torch had.
        rounds: in how many rounds it was timed.
        latency_ms: median wall time of a batch, milliseconds.
        cpu_ms: the median processor time of all threads for one batch, milliseconds.
        speedup: how many times as fast as the first variant it was, by wall time.
        cpu_speedup: by processor time, which other programs disturb less.
    """

    variant: str
    batch_size: int
    threads: int
    rounds: int
    latency_ms: float
    cpu_ms: float
    speedup: float
    cpu_speedup: float

    @property
    def images_per_second(self) -> float:
        """Throughput."""
        return 1000 * self.batch_size / self.latency_ms

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "images_per_second": self.images_per_second}


@checked(DataError, progress=OptionError)
@torch.inference_mode()
def measure(
    variants: Mapping[str, Variant],
    images_bchw: Tensor,
    *,
    threads: int = 1,
    seconds: float = 5.0,
    progress: ProgressReporter | bool | None = None,
) -> list[Timing]:
    """Time every variant on one batch of images, in turns, for about `seconds` in all and three rounds at least.

    The first variant is what the others are compared with. Each runs once before, untimed. torch's number of threads
    is restored afterwards. Raises DataError without variants, and for threads below 1.

    Args:
        variants: what to time, by name; each takes the images. The others are compared with the first.
        images_bchw: one batch, float (B, C, H, W).
        threads: how many threads torch has meanwhile.
        seconds: for about how long it is repeated, all variants together.
        progress: where it reports how far it is, as in `fxquant.compile`.
    """
    if not variants or not 1 <= threads <= 1024 or seconds < 0 or images_bchw.ndim != 4 or not len(images_bchw):
        raise DataError(
            f"{len(variants)} variants on {threads} threads for {seconds} s, images of shape "
            f"{tuple(images_bchw.shape)}: there is nothing to time"
        )
    before = torch.get_num_threads()
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    with shown(progress) as reporter:
        task = reporter.track(f"timing batches of {len(images_bchw)}", len(variants) + math.ceil(seconds))
        try:
            torch.set_num_threads(threads)
            for name, run in variants.items():
                _try_out(name, run, images_bchw)
                task.advance()
            begin, passed_s = time.perf_counter(), 0.0
            while len(next(iter(wall.values()))) < _FEWEST_ROUNDS or passed_s < seconds:
                for name, run in variants.items():
                    start, cpu_start = time.perf_counter(), time.process_time()
                    run(images_bchw)
                    wall[name].append(time.perf_counter() - start)
                    cpu[name].append(time.process_time() - cpu_start)
                whole_s, passed_s = int(min(passed_s, seconds)), time.perf_counter() - begin
                task.advance(int(min(passed_s, seconds)) - whole_s)
        finally:
            torch.set_num_threads(before)
            task.close()
    first = next(iter(variants))
    return [
        Timing(
            name, len(images_bchw), threads, len(wall[name]),
            1000 * statistics.median(wall[name]), 1000 * statistics.median(cpu[name]),
            _ratio(wall[first], wall[name]), _ratio(cpu[first], cpu[name]),
        )
        for name in variants
    ]  # fmt: skip


def _try_out(name: str, run: Variant, images_bchw: Tensor) -> None:
    try:
        run(images_bchw)
    except FxQuantError:
        raise
    except Exception as error:  # whatever a model of the caller's raises
        raise DataError(f"{name} cannot run on images of shape {tuple(images_bchw.shape)}: {error}") from error


def _ratio(reference: list[float], found: list[float]) -> float:
    return statistics.median(a / max(b, 1e-9) for a, b in zip(reference, found, strict=True))


def float_graph(graph_module: GraphModule) -> GraphModule:
    """A simulated graph without its quantizers: the same architecture in float32, for comparing speed."""
    found = copy.deepcopy(graph_module)
    for name, module in list(found.named_modules()):
        if isinstance(module, QuantizedWeightModule):
            module.input_quantizer = None
        elif isinstance(module, QuantizedMatmul):
            module.left_quantizer = module.right_quantizer = None
        elif isinstance(module, QuantizedInput):
            found.add_submodule(name, module.inner)
    return found


def bfloat16_variant(model: torch.nn.Module) -> Variant:
    """A copy of the model in bfloat16, which takes float32 images."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    return lambda images_bchw: half(images_bchw.to(torch.bfloat16))
