"""Accuracy of the embedded model calibrated on real images, on noise, and on images synthesised in n steps a stage.

    python benchmarks/zero_shot.py --steps 10,30,100 --seeds 2 --budgets W4A4,W3A3

Protocol: mptq_vit with widths 2 to 6, allocator Swaps, 32 calibration images, all 2,000 test images. Real images of
seed s are the s-th 32 of the 512 that come with the package; noise is a standard normal, held in the pictures' range.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor, nn

import fxquant
from allocators.swaps import Swaps
from fxquant import embedded
from fxquant.data import embedded_test
from fxquant.evaluation import evaluate
from fxquant.sweep import Prepared
from fxquant.synthesis.synthesize import Pictures, Synthesis

COUNT = 32


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", default="10,30,100")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--budgets", default="W4A4,W3A3")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = embedded.load_model().requires_grad_(False)
    print(json.dumps({"images": "float32", "top1": evaluate(model, embedded_test()).top1}))
    real = embedded.calibration_images(COUNT * given.seeds)
    for seed in range(given.seeds):
        report(model, "real", seed, real[COUNT * seed : COUNT * (seed + 1)], given.budgets)
        options = Synthesis(COUNT, mean=(embedded.MEAN,), std=(embedded.STD,))
        low, high = Pictures.of(model, options).limits
        noise = torch.randn(COUNT, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        report(model, "noise", seed, noise.clamp(low, high), given.budgets)
        for steps in map(int, given.steps.split(",")):
            options = Synthesis(COUNT, steps, mean=(embedded.MEAN,), std=(embedded.STD,))
            started_s = time.process_time()
            images = fxquant.synthesize(model, options, seed=seed, batch_size=COUNT)
            seconds = round(time.process_time() - started_s, 1)
            report(model, f"2 x {steps} steps, {seconds} CPU s", seed, images, given.budgets)


def report(model: nn.Module, name: str, seed: int, images: Tensor, budgets: str) -> None:
    """Print one line of JSON: accuracy (%) at each budget."""
    prepared = Prepared(model, images, bits=(2, 3, 4, 5, 6))
    found = {budget: evaluate(prepared.compile(budget, Swaps()), embedded_test()).top1 for budget in budgets.split(",")}
    print(json.dumps({"images": name, "seed": seed, **found}), flush=True)


if __name__ == "__main__":
    main()
