"""How long `best` takes on a GPU, by pass, and how much memory: a ViT-tiny, a DeiT-B and a ViT-L of random weights.

    python benchmarks/gpu.py --device cuda:0 --images 32

Each model is compiled once to warm the GPU up, on two images, and once more that counts. Prints a table, and keeps JSON
in benchmarks/results/gpu.json. Without such a device it ends with an OptionError that lists what there is. Random
weights say how long it takes, and nothing of accuracy.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch

import fxquant
from fxquant.checks.devices import device_named, devices

RESULTS = Path(__file__).parent / "results"
MODELS = ("vit_tiny_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224")


def main() -> None:
    """Compile each model on the device, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--budget", default="W4A4")
    parser.add_argument("--images", type=int, default=32)
    options = parser.parse_args()
    device = device_named(options.device)
    torch.backends.cudnn.allow_tf32 = False  # so that float32 is float32, as on a CPU
    found = {name: compiled(name, device, options) for name in options.models}
    rows = {
        "device": devices().get(str(device), str(device)),
        "torch": str(torch.__version__),
        "recipe": options.recipe,
        "budget": options.budget,
        "images": options.images,
        "models": found,
    }
    (RESULTS / "gpu.json").write_text(json.dumps(rows, indent=1) + "\n")
    passes = list(dict.fromkeys(step for result in found.values() for step in result["passes"]))
    print(f"{rows['device']}, torch {rows['torch']}, {options.recipe} at {options.budget}, {options.images} images\n")
    print(f"{'seconds':<22}" + "".join(f"{name:>26}" for name in found))
    for step in passes:
        print(f"{step:<22}" + "".join(f"{result['passes'].get(step, 0.0):>26.2f}" for result in found.values()))
    for row in ("wall_s", "peak_gib"):
        print(f"{row:<22}" + "".join(f"{result[row]:>26.2f}" for result in found.values()))


def compiled(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the whole and of every pass, and the most memory of the device that was taken."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(device)
    images = torch.randn(options.images, 3, 224, 224)
    fxquant.compile(model, options.budget, calibration=images[:2], recipe=options.recipe)
    torch.accelerator.synchronize(device)
    torch.accelerator.reset_peak_memory_stats(device)
    start = time.perf_counter()
    quantized = fxquant.compile(model, options.budget, calibration=images, recipe=options.recipe)
    torch.accelerator.synchronize(device)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "wall_s": round(time.perf_counter() - start, 2),
        "peak_gib": round(torch.accelerator.max_memory_allocated(device) / 2**30, 2),
        "passes": {entry.step.split("(")[0]: round(entry.seconds, 2) for entry in quantized.journal.entries},
    }


if __name__ == "__main__":
    main()
