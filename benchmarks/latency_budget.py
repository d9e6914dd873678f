"""Latency as budgets predict it, beside the latency measured on the same model once it is compiled and lowered.

    python benchmarks/latency_budget.py embedded
    python benchmarks/latency_budget.py vit_tiny_patch16_224 --weights W.safetensors --calibration C.npz

One thread, its processor time; least of repeated runs. Rows: mean widths alone, and W8A8 at latencies between the
slowest and the fastest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fxquant.data import embedded
from fxquant.data.images import load_images
from fxquant.data.models import load_model
from fxquant.runtime.integer.kernel_times import least_ms, machine
from fxquant.session.session import Session
from passes.allocate.measure_latency import MeasureLatency

ANY_MS = 1e9


def main() -> None:
    """Print a line for every budget and keep them in benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = load_model(options.model, options.weights, options.num_classes)
    images = embedded.calibration_images(options.images)
    if options.calibration is not None:
        images = load_images(options.calibration, options.images, named.preprocessing, 0)
    latency = MeasureLatency(options.batch_size)
    session = Session(named.model, images, recipe=options.recipe, backend="cpu-native", latency=latency)
    table = session.cost_table(f"W8A8, {ANY_MS:g}ms")
    least, most = table.minimum_usage()["latency_ms"], table.usage(table.highest())["latency_ms"]
    limits = [(f"W{bits}A{bits}", ANY_MS) for bits in (8, 6, 4)]
    limits += [("W8A8", least + part * (most - least)) for part in (0.75, 0.5, 0.25, 0.05)]
    rows = []
    for means, limit in limits:
        compiled = session.compile(f"{means}, {limit:.4g}ms")
        assert compiled.allocation is not None
        lowered, batch = compiled.lowered("cpu-native"), images[: options.batch_size]
        with torch.inference_mode():
            measured = least_ms(lambda run=lowered, x=batch: run(x), threads=1, seconds=1.0)
        row = {
            "budget": str(compiled.allocation.budget) if limit < ANY_MS else means,
            "predicted_ms": round(compiled.allocation.usage["latency_ms"], 3),
            "measured_ms": round(measured, 3),
            "predicted_loss": compiled.allocation.objective,
            "mean_activation_bits": round(compiled.allocation.usage["mean_activation_bits"], 3),
        }
        rows.append(row)
        print(row, flush=True)
    result = {**machine(), "batch_size": options.batch_size, "recipe": options.recipe, "rows": rows}
    path = Path(__file__).parent / "results" / f"latency_budget_{options.model}_{options.batch_size}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
