"""Which instruction sets a built library of kernels has, and which it runs here: all that it should, or refused.

A library can hold a set's kernels and yet never choose them, where it does not find out what the processor has. So it
is asked on this machine, if it is for its kind, and its answer is held against what Linux says of the processor. A
library for another kind is only searched for the names of its sets.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Collection
from pathlib import Path

_AVX2 = {"avx2", "fma"}
_AVX512 = _AVX2 | {"avx512_vnni", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi"}
# What Linux calls the instructions of a set in /proc/cpuinfo.
FLAGS = {
    "scalar": set[str](),
    "avx2": _AVX2,
    "avx-vnni": _AVX2 | {"avx_vnni"},
    "avx512-vnni": _AVX512,
    "amx-int8": _AVX512 | {"amx_tile", "amx_int8"},
    "neon": set[str](),
    "neon-dotprod": {"asimddp"},
    "neon-i8mm": {"asimddp", "i8mm"},
}


class InstructionSetError(Exception):
    """A library that lacks an instruction set, or does not run one that the processor has."""


def check_sets(path: Path, sets: Collection[str], target: str) -> str:
    """A line that says which instruction sets a library has. Raises InstructionSetError where one is missing.

    Args:
        path: the library.
        sets: those that it should have.
        target: what zig compiled it for, such as x86_64-linux-gnu.2.17.
    """
    content = path.read_bytes()
    if missing := [name for name in sets if name.encode() + b"\0" not in content]:
        raise InstructionSetError(f"{path.name} lacks the instruction sets {', '.join(missing)}")
    line = f"has {', '.join(sets)}"
    if sys.platform != "linux" or not target.startswith(f"{platform.machine()}-linux"):
        return f"{line}; not run, since this machine is of another kind"
    runs = sets_that_run(path)
    has = flags_of_processor()
    if idle := [name for name in sets if FLAGS[name] <= has and name not in runs]:
        raise InstructionSetError(f"{path.name} does not run {', '.join(idle)}, which this processor has")
    return f"{line}; runs {', '.join(runs)} here"


def sets_that_run(path: Path) -> list[str]:
    """The instruction sets of a library for this kind of machine that it runs on this one, best last."""
    kernels = ctypes.CDLL(str(path))
    kernels.fxq_name.restype = ctypes.c_char_p
    return [kernels.fxq_name(number).decode() for number in range(kernels.fxq_best() + 1) if kernels.fxq_runs(number)]


def flags_of_processor() -> set[str]:
    """What Linux says that this machine's processor has."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}
