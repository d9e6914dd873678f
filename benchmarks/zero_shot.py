"""Accuracy of a model calibrated on real images, on noise, and on images synthesised in n steps a stage.

    python benchmarks/zero_shot.py embedded --steps 10,30,100 --seeds 2
    python benchmarks/zero_shot.py vit_tiny_patch16_224 --weights W.safetensors --calibration C.npz --test T.npz \\
        --recipe best --budgets W6A6,W4A4

32 calibration images; the .npz files are those of accuracy.py. Real images of seed s are the s-th 32 of the calibration
file; noise is a standard normal, held in the pictures' range. The recipe mptq_vit has widths 2 to 6 and allocator Swaps
here, others their own. Quantized models run on integer kernels where layers have them. Results go to
benchmarks/results/zero_shot_MODEL.json after every row, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import torch
from accuracy import RESULTS, load, top1
from torch import Tensor, nn

import fxquant
from allocators.swaps import Swaps
from fxquant.artefact.cache import signature
from fxquant.data import embedded
from fxquant.session.session import Session
from fxquant.session.sweep import Results
from fxquant.synthesis.pictures import Pictures, Synthesis
from passes.recipes import RECIPES

COUNT = 32
PICTURES: dict[str, dict[str, Any]] = {"embedded": {"mean": (embedded.MEAN,), "std": (embedded.STD,)}}
OWN: dict[str, dict[str, Any]] = {"mptq_vit": {"bits": (2, 3, 4, 5, 6)}}


def main() -> None:
    """Measure what is missing and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--calibration")
    parser.add_argument("--test")
    parser.add_argument("--limit", type=int, default=2000, help="test images")
    parser.add_argument("--steps", default="30")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budgets", default="W4A4,W3A3")
    parser.add_argument("--recipe", default="mptq_vit")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.images = COUNT * given.seeds
    model, real, images, labels = load(given)
    model.requires_grad_(False)
    results = Results(RESULTS / f"zero_shot_{given.model}.json")
    settings = signature(model, real, len(images), given.recipe)
    sources = ["real", "noise", *(int(steps) for steps in given.steps.split(",") if steps)]
    results.point(signature(settings, "float"), lambda: {"images": "float", "top1": top1(model, images, labels)})
    for seed in range(given.seeds):
        for source in sources:
            session: Session | None = None
            for budget in given.budgets.split(","):
                key = signature(settings, source, seed, budget)
                if key in results.points:
                    continue
                if session is None:
                    pixels, cpu_s = calibration(model, real, source, seed, PICTURES.get(given.model, {}))
                    own = OWN.get(given.recipe, {})
                    session = Session(model, pixels, recipe=partial(RECIPES[given.recipe], **own), seed=seed)
                quantized = session.compile(budget, Swaps() if given.recipe in OWN else None)
                point = {
                    "images": source if isinstance(source, str) else f"2 x {source} steps",
                    "seed": seed,
                    "budget": budget,
                    "recipe": given.recipe,
                    "top1": top1(quantized.lowered("auto"), images, labels),
                    "synthesis_cpu_s": cpu_s,
                    "test_images": len(labels),
                }
                results.point(key, lambda point=point: point)
                print(json.dumps(point), flush=True)


def calibration(
    model: nn.Module, real: Tensor, source: str | int, seed: int, pictures: dict[str, Any]
) -> tuple[Tensor, float]:
    """Images, float (32, C, H, W), and the CPU seconds they took. source: "real", "noise" or steps a stage."""
    started_s = time.process_time()
    pixels = real[COUNT * seed : COUNT * (seed + 1)]
    if source == "noise":
        low, high = Pictures.of(model, Synthesis(**pictures)).limits
        pixels = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).clamp(low, high)
    elif isinstance(source, int):
        pixels = fxquant.synthesize(model, Synthesis(COUNT, source, **pictures), seed=seed)
    return pixels, round(time.process_time() - started_s, 1)


if __name__ == "__main__":
    main()
