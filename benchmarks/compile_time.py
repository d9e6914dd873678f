"""CPU seconds and peak memory of compiling models, and how the seconds grow; random weights or given ones.

    python benchmarks/compile_time.py vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_224 \\
        vit_large_patch16_224 --recipe best --budget W4A8 --images 8
    python benchmarks/compile_time.py vit_tiny_patch16_224 --recipe lampq --weights W.safetensors --calibration C.npz

    python benchmarks/compile_time.py vit_giant_patch14_224 --depth 4 --recipe best --budget W4A8 --images 2

Every model is compiled in a process of its own, after a process that only runs its forward on the same images, eight
at a time: `peak_ratio` is the peak of the one over that of the other. With two models or more the exponent is printed
of seconds ~ parameters^exponent, fitted by least squares to the logarithms. How long UpdateBits of lampq searches
depends on the weights, so that recipe wants real ones. The .npz file is that of accuracy.py. Models too large for the
machine are compiled with fewer blocks at two depths: the difference is what a block takes. Kept in
benchmarks/results/compile_time_MODEL_RECIPE.json, or with _blocks_DEPTH before the ending.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
FORWARD_BATCH = 8


def main() -> None:
    """Compile each model once, print JSON and keep it in benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--budget", default="W4A4")
    parser.add_argument("--recipe", default="mptq_vit")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--depth", type=int, help="blocks of the model; all by default")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step", choices=("forward", "compile"), help="what a process of the benchmark's own does")
    options = parser.parse_args()
    if options.step:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        print(json.dumps(forward_peak(options) if options.step == "forward" else compiled(options)))
        return
    found = []
    for model in options.models:
        passed_on = [argument for argument in sys.argv[1:] if argument not in options.models]
        forward, result = (
            json.loads(subprocess.check_output([sys.executable, __file__, model, *passed_on, "--step", step]))
            for step in ("forward", "compile")
        )
        result |= {**forward, "peak_ratio": round(result["peak_mib"] / forward["forward_peak_mib"], 2)}
        blocks = "" if options.depth is None else f"_blocks_{options.depth}"
        (RESULTS / f"compile_time_{model}_{options.recipe}{blocks}.json").write_text(
            json.dumps(result, indent=1) + "\n"
        )
        print(json.dumps(result, indent=1), flush=True)
        found.append(result)
    if len(found) > 1:
        sizes, seconds = (np.log([result[key] for result in found]) for key in ("parameters", "cpu_s"))
        print(f"CPU seconds grow with parameters to the power of {np.polyfit(sizes, seconds, 1)[0]:.2f}")


def given(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model and its images."""
    name = options.models[0]
    if options.weights:
        from accuracy import normalized

        from fxquant.data.models import load_model

        named = load_model(name, options.weights, num_classes=options.num_classes)
        pixels = np.load(options.calibration)["images"][: options.images]
        return named.model, normalized(pixels, named.preprocessing.mean, named.preprocessing.std)
    depth = {} if options.depth is None else {"depth": options.depth}
    model = timm.create_model(name, num_classes=options.num_classes, **depth).eval()
    return model, torch.randn(options.images, 3, 224, 224)


def forward_peak(options: argparse.Namespace) -> dict[str, Any]:
    """Peak of a process that builds the model and runs the images through it; fxquant is not imported for it."""
    model, images = given(options)
    with torch.inference_mode():
        for batch in images.split(FORWARD_BATCH):
            model(batch)
    return {"forward_peak_mib": peak_mib()}


def compiled(options: argparse.Namespace) -> dict[str, Any]:
    """What one compile takes."""
    import fxquant

    model, images = given(options)
    before_mib = peak_mib()
    start, cpu = time.perf_counter(), time.process_time()
    quantized = fxquant.compile(model, options.budget, calibration=images, recipe=options.recipe)
    return {
        "model": options.models[0],
        **({} if options.depth is None else {"depth": options.depth}),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": "given" if options.weights else "random",
        "budget": options.budget,
        "recipe": options.recipe,
        "calibration_images": options.images,
        "threads": options.threads,
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "before_mib": before_mib,
        "peak_mib": peak_mib(),
        "passes": {entry.step.split("(")[0]: round(entry.seconds, 2) for entry in quantized.journal.entries},
    }


def peak_mib() -> int:
    """Of this process so far, resident."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
