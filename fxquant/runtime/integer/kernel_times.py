"""How long single kernels take on this machine: the least time of repeated runs, which other programs disturb least.

On one thread it is that thread's processor time, so waiting for a core that others use does not count; else wall time.
Operands are what layers have: bell-shaped weights, bytes of all codes. A set may choose its loop by how large they are.
Deliberately not done: fused forms (attention, epilogues); they add the same to every width, and so cancel out where
widths are compared.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.lowered import IntegerLinear, IntegerMatmul
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedLinear

_FEWEST_RUNS = 7
_SPREAD = 3.5
"""Largest weight of an output channel, in standard deviations."""


def least_ms(run: Callable[[], object], threads: int, seconds: float = 0.05) -> float:
    """Least time of a run, in ms, over about `seconds` of runs and seven at least; torch's threads are restored.

    Args:
        run: what is timed; its result is dropped.
        threads: how many threads torch has meanwhile.
        seconds: for about how long it is repeated.
    """
    before, clock = torch.get_num_threads(), time.thread_time if threads == 1 else time.perf_counter
    times: list[float] = []
    try:
        torch.set_num_threads(threads)
        run()
        end = clock() + seconds
        while len(times) < _FEWEST_RUNS or clock() < end:
            start = clock()
            run()
            times.append(clock() - start)
    finally:
        torch.set_num_threads(before)
    return 1000 * min(times)


def linear_ms(rows: int, inner: int, out: int, weight_bits: int, code: ByteCode, threads: int) -> float:
    """A linear layer of `rows` inputs, weights of this width, inputs of this code.

    Args:
        rows: how many rows the input has, tokens of all images.
        inner: input channels.
        out: output channels.
        weight_bits: width of the weights, 2 to 8.
        code: how the inputs are bytes.
        threads: how many threads the kernel has.
    """
    weight = torch.randn(out, inner, generator=torch.Generator().manual_seed(0))
    quantizer = UniformQuantizer(weight_bits, _SPREAD / 2 ** (weight_bits - 1))
    layer = IntegerLinear(QuantizedLinear(weight, torch.zeros(out), quantizer, None), code)
    codes = _random_bytes(code, rows, inner)
    return least_ms(lambda: layer(codes), threads)


def matmul_ms(groups: int, rows: int, inner: int, columns: int, left: ByteCode, right: ByteCode, threads: int) -> float:
    """`groups` products of (rows, inner) and (inner, columns) activations of these codes.

    Args:
        groups: how many products there are, images times heads.
        rows: rows of the left operand.
        inner: length of the summed axis.
        columns: columns of the right operand.
        left: how the left operand is bytes.
        right: how the right operand is bytes.
        threads: how many threads the kernel has.
    """
    product = IntegerMatmul(left, right)
    operands = [_random_bytes(left, groups, rows, inner), _random_bytes(right, groups, inner, columns)]
    return least_ms(lambda: product(*operands), threads)


def _random_bytes(code: ByteCode, *shape: int) -> Tensor:
    """Bytes that a quantizer of this code gives, uint8 of this shape, all as often."""
    values = torch.tensor(code.bytes_given, dtype=torch.uint8)
    return values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(0))]


def time_key(code: ByteCode) -> tuple[int, ...]:
    """What the time of a product with bytes of this code depends on: digits, and how far they reach where loops do.

    Codes of equal keys take as long. Raises BackendError without kernels.
    """
    digits = int(code.levels_spec().count)
    return (digits, code.reach) if library.loop_depends_on_widths() else (digits,)


def machine() -> dict[str, str]:
    """What times depend on besides shapes: processor, instruction set, the kernels' build, torch.

    Raises BackendError where there are no kernels.
    """
    instruction_set = library.instruction_set()
    return {
        "processor": _processor(), "instruction_set": instruction_set, "kernels": _build(), "torch": torch.__version__
    }  # fmt: skip


@cache
def _build() -> str:
    files = sorted(Path(library.__file__).parent.glob("_kernels*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
