"""Latency of a model as timm runs it, in torch's float formats, and of its artefact with integer kernels; in turns.

python benchmarks/inference.py model.fxq vit_tiny_patch16_224 --num-classes 200 --compile

The float model has random weights: they do not change its speed. It runs as timm writes it, with fused attention.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import timm
import torch

import fxquant
from fxquant.graph.notes import IMAGE_SHAPE
from fxquant.measure.timing import bfloat16_variant, measure


def processor() -> str:
    """Name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure, print JSON and keep it in benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("model")
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--backend", nargs="+", default=["auto"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--name", help="of the result file; the model's name otherwise")
    options = parser.parse_args()
    model = timm.create_model(options.model, num_classes=options.num_classes).eval().requires_grad_(False)
    variants: dict[str, Any] = {"float32 eager": model, "bfloat16 eager": bfloat16_variant(model)}
    if options.compile:
        variants["float32 compiled"] = torch.compile(model)
        variants["bfloat16 compiled"] = torch.compile(variants["bfloat16 eager"])
    simulated = fxquant.load(options.artefact)
    for backend in options.backend:
        variants[f"integer, {backend}"] = lowered = simulated.lowered(backend)
    timings = []
    for size in options.batch_size:
        images = torch.randn(size, *IMAGE_SHAPE.of(simulated.graph_module))
        timings += measure(variants, images, threads=options.threads, seconds=options.seconds)
    result = {
        "model": options.model,
        "budget": str(simulated.allocation.budget) if simulated.allocation else None,
        "execution": lowered.card["execution"],
        "artefact_mb": round(options.artefact.stat().st_size / 1e6, 3),
        "processor": processor(),
        "torch": torch.__version__,
        "timings": [timing.to_dict() for timing in timings],
    }
    path = Path(__file__).parent / "results" / f"inference_{options.name or options.model}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
