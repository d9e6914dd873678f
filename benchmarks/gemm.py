"""GOP/s of one linear layer: our kernels at several weight widths, torch's float32 and bfloat16, oneDNN's int8.

python benchmarks/gemm.py

One thread; the best of repeated runs, by processor time of the thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import byte_code
from fxquant.runtime.integer.lowered import IntegerLinear
from fxquant.runtime.simulated import QuantizedLinear

SHAPES = ((197, 192, 768), (197, 768, 192), (197, 384, 1536), (197, 1536, 384), (6304, 384, 1536), (6304, 1536, 384))


def best_seconds(run: Callable[[], object], seconds: float = 0.3) -> float:
    """Least thread time of a run, over `seconds` of runs."""
    run()
    best, end = float("inf"), time.thread_time() + seconds
    while time.thread_time() < end:
        start = time.thread_time()
        run()
        best = min(best, time.thread_time() - start)
    return best


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    input_quantizer = UniformQuantizer(8, 0.05)
    code = byte_code(input_quantizer)
    assert code is not None
    for rows, inner, out in SHAPES:
        x, weight, bias = torch.randn(rows, inner), torch.randn(out, inner), torch.randn(out)
        codes = torch.randint(0, 256, (rows, inner), dtype=torch.uint8)
        runs: dict[str, Callable[[], object]] = {}
        for bits in (8, 4, 3, 2):
            quantizer = UniformQuantizer(bits, weight.abs().amax(1, keepdim=True) / 2 ** (bits - 1))
            layer = IntegerLinear(QuantizedLinear(weight, bias, quantizer, input_quantizer), code)
            runs[f"W{bits}"] = lambda layer=layer, codes=codes: layer(codes)
        half = [tensor.bfloat16() for tensor in (x, weight, bias)]
        runs["float32"] = lambda x=x, weight=weight, bias=bias: functional.linear(x, weight, bias)
        runs["bfloat16"] = lambda half=half: functional.linear(*half)
        packed = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (out, inner), dtype=torch.int8), None)
        numbers = (0.05, 128, packed, torch.full((out,), 0.01), torch.zeros(out, dtype=torch.int32), bias)
        tail = (1.0, 0, torch.float32, "none", [], "")
        runs["oneDNN int8"] = lambda codes=codes, numbers=numbers, tail=tail: torch.ops.onednn.qlinear_pointwise(
            codes, *numbers, *tail
        )
        found = {name: 2e-9 * rows * inner * out / best_seconds(run) for name, run in runs.items()}
        print((rows, inner, out), "  ".join(f"{name} {speed:.0f}" for name, speed in found.items()), flush=True)


if __name__ == "__main__":
    main()
