"""The search of AdaLog's base and scale: all candidates at once from a histogram, beside one fake-quant per candidate.

    python benchmarks/search_speed.py --tokens 6304 --channels 768

One post-GELU activation, by default that of 32 images in a ViT-tiny's fc2 (random values), weights h of the
Hessian-guided metric included. The loop is run over a sample of the candidates, and its time scaled up; both must give
these candidates the same error. Prints JSON and keeps it in benchmarks/results/search_speed.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from fxquant.quantizers.adalog import adalog_gelu
from fxquant.quantizers.family import Statistics
from fxquant.quantizers.statistics.histogram import Bfloat16Histogram


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32 * 197)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sample", type=int, default=20, help="candidates that the loop is timed on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = functional.gelu(torch.randn(options.tokens, options.channels, generator=generator))
    h = torch.rand(x.shape, generator=generator)

    start = time.process_time()
    histogram = Bfloat16Histogram()
    histogram.update(x, h)
    moments = histogram.finish()
    gathered = time.process_time()
    low, high = float(x.min()), float(x.max())
    proposals = adalog_gelu(Statistics(moments, low, high, low), options.bits)
    _, errors = moments.errors(proposals.levels, proposals.thresholds)
    searched = time.process_time()

    picked = np.linspace(0, len(errors) - 1, options.sample).astype(int)
    quantizers = [proposals.build(int(index)) for index in picked]
    start_loop = time.process_time()
    plain = [float((h * (quantizer(x) - x).square()).sum(dtype=torch.float64)) for quantizer in quantizers]
    loop = (time.process_time() - start_loop) * len(errors) / len(picked)
    ratio = errors[picked] / np.array(plain)
    result = {
        "values": x.numel(),
        "bits": options.bits,
        "candidates": len(errors),
        "histogram_cpu_s": round(gathered - start, 3),
        "search_cpu_s": round(searched - gathered, 3),
        "loop_cpu_s": round(loop, 1),
        "loop_over_search": round(loop / (searched - start), 1),
        "largest_relative_difference": float(np.abs(ratio - 1).max()),
    }
    path = Path(__file__).parent / "results" / "search_speed.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
