"""What evaluation spends beside a model's arithmetic: finding levels, and fetching memory for large batches.

    python benchmarks/evaluation_speed.py

CPU nanoseconds a value to find the nearest level of a post-softmax and a post-GELU activation of 16 images of a DeiT-T,
by binary search and by the table of buckets (`fxquant/quantizers/thresholds.py`); CPU milliseconds an image of the
float DeiT-T, random weights, by batch size. One thread. Results go to benchmarks/results/evaluation_speed.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional

from fxquant.quantizers.adalog import GELU_SHIFT, AdaLogQuantizer
from fxquant.quantizers.thresholds import thresholds_below

RESULTS = Path(__file__).parent / "results" / "evaluation_speed.json"
IMAGES, BATCHES = 64, (64, 27, 16)


def cpu_s(function: Callable[[], Any], rounds: int = 3) -> float:
    """The least CPU time of a few calls, after one that is not timed."""
    function()
    found = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)


def nanoseconds(x: Tensor, levels: Tensor) -> dict[str, float]:
    """CPU time a value of either way, whose codes are compared."""
    middles = (levels[1:] + levels[:-1]) / 2
    ways = {
        "search": lambda: torch.bucketize(x, middles, out_int32=True),
        "table": lambda: thresholds_below(x, middles),
    }
    if not torch.equal(ways["search"](), ways["table"]()):
        raise SystemExit("the codes differ")
    return {way: round(cpu_s(run) / x.numel() * 1e9, 1) for way, run in ways.items()}


@torch.inference_mode()
def main() -> None:
    """Measure, print and keep both."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    softmax = (2 * torch.randn(16, 3, 197, 197, generator=draw)).softmax(-1)
    gelu = functional.gelu(torch.randn(16, 197, 768, generator=draw))
    found: dict[str, Any] = {"nanoseconds_a_value": {}, "milliseconds_an_image": {}}
    for bits in (3, 4, 6, 8):
        found["nanoseconds_a_value"][f"softmax, {bits} bits"] = nanoseconds(
            softmax, AdaLogQuantizer(bits, 1, 20).levels()
        )
        shifted = AdaLogQuantizer(bits, 3, 20, GELU_SHIFT)
        found["nanoseconds_a_value"][f"GELU, {bits} bits"] = nanoseconds(gelu, shifted.levels())
    model = timm.create_model("deit_tiny_patch16_224").eval()
    images = torch.randn(IMAGES, 3, 224, 224, generator=draw)
    for size in BATCHES:
        spent = cpu_s(lambda size=size: [model(part) for part in images.split(size)], rounds=2)
        found["milliseconds_an_image"][f"batches of {size}"] = round(spent / IMAGES * 1e3, 1)
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
