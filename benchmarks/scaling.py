"""What a second thread brings, on every instruction set that this processor runs, by the clock.

    python benchmarks/scaling.py deit_small.fxq vit_tiny.fxq --seconds 20

One and two threads take turns, so that both share the machine's moods; it has to be at rest, and to have two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from inference import processor

import fxquant
from fxquant.graph.notes import IMAGE_SHAPE
from fxquant.runtime.native.library import instruction_sets, select_instruction_set


@torch.inference_mode()
def scaling(model: torch.nn.Module, images_bchw: torch.Tensor, threads: int, seconds: float) -> dict[str, Any]:
    """Median milliseconds of a batch on one thread and on `threads`, and the median ratio of neighbours."""
    took_s: dict[int, list[float]] = {1: [], threads: []}
    end = time.perf_counter() + seconds
    while len(took_s[1]) < 5 or time.perf_counter() < end:
        for number, found in took_s.items():
            torch.set_num_threads(number)
            model(images_bchw)  # threads are made, or put to sleep, outside of what is timed
            begin = time.perf_counter()
            model(images_bchw)
            found.append(time.perf_counter() - begin)
    ratios = sorted(one / more for one, more in zip(took_s[1], took_s[threads], strict=True))
    return {
        "one_ms": round(1000 * statistics.median(took_s[1]), 3),
        "more_ms": round(1000 * statistics.median(took_s[threads]), 3),
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
        "rounds": len(ratios),
    }


def main() -> None:
    """Measure, print and keep JSON in benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefacts", type=Path, nargs="+")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    options = parser.parse_args()
    rows = []
    for artefact in options.artefacts:
        simulated = fxquant.load(artefact)
        for name in instruction_sets()[1:]:
            select_instruction_set(name)
            lowered = simulated.lowered("cpu-native")
            for size in options.batch_size:
                images_bchw = torch.randn(size, *IMAGE_SHAPE.of(simulated.graph_module))
                found = scaling(lowered, images_bchw, options.threads, options.seconds)
                rows.append({"artefact": artefact.stem, "instruction_set": name, "batch_size": size, **found})
                print(rows[-1], flush=True)
    result = {"processor": processor(), "torch": torch.__version__, "threads": options.threads, "rows": rows}
    path = Path(__file__).parent / "results" / "scaling.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
