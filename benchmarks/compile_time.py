"""Seconds and peak memory of one compile, pass by pass; random weights and images, or given ones.

    python benchmarks/compile_time.py deit_small_patch16_224 --budget W4A4
    python benchmarks/compile_time.py vit_tiny_patch16_224 --recipe lampq --weights W.safetensors --calibration C.npz

How long UpdateBits of lampq searches depends on the weights, so that recipe wants real ones. The .npz file is that of
accuracy.py. Kept in benchmarks/results/compile_time_MODEL_RECIPE.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import timm
import torch
from accuracy import normalized

import fxquant
from fxquant.models import load_model


def main() -> None:
    """Compile once, print JSON and keep it in benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", default="W4A4")
    parser.add_argument("--recipe", default="mptq_vit")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.weights:
        named = load_model(options.model, options.weights, num_classes=options.num_classes)
        pixels = np.load(options.calibration)["images"][: options.images]
        model, images = named.model, normalized(pixels, named.preprocessing.mean, named.preprocessing.std)
    else:
        model = timm.create_model(options.model, num_classes=options.num_classes).eval()
        images = torch.randn(options.images, 3, 224, 224)
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start, cpu = time.perf_counter(), time.process_time()
    compiled = fxquant.compile(model, options.budget, calibration=images, recipe=options.recipe)
    result = {
        "model": options.model,
        "weights": "given" if options.weights else "random",
        "budget": options.budget,
        "recipe": options.recipe,
        "calibration_images": options.images,
        "threads": options.threads,
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_mib_before": round(before_mib),
        "passes": {entry.step.split("(")[0]: round(entry.seconds, 2) for entry in compiled.journal.entries},
    }
    path = Path(__file__).parent / "results" / f"compile_time_{options.model}_{options.recipe}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
