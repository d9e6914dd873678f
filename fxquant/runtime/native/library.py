"""The kernels' shared library: found, loaded with ctypes, and its structures; absent where no compiler built it.

`fxquant_native.h` documents every function and structure; this file mirrors it. The library checks all it is given and
returns a status, which `call` turns into a BackendError.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint8, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from fxquant.errors import BackendError

ABI = 9
MAX_DIGITS, MAX_INNER, MAX_RANGES, MAX_STEPS, MAX_PARTS, MAX_CODES = 3, 32768, 3, 8, 256, 32
UNIFORM, REGIONS, LOG2, ROW_LOG, CODEBOOK = range(5)
FLOAT, RESIDUAL, CODES, GELU_CODES, TABLE_CODES = range(5)
LAYER_NORM, LINEAR, ATTENTION = range(3)
CHAIN_MAGIC, LAYOUT_VERSION = 0x43515846, 6


class QuantizerSpec(Structure):
    """`FxqQuantizer`: from a float to a byte."""

    _fields_ = (
        ("kind", c_int32), ("scale", c_float), ("zero", c_int32), ("low", c_int32), ("high", c_int32),
        ("bits", c_int32), ("shift_small", c_int32), ("shift_large", c_int32), ("negative", c_int32),
        ("codes", c_int32), ("below", c_uint8 * MAX_CODES), ("code", c_uint8 * MAX_CODES),
    )  # fmt: skip


class LevelsSpec(Structure):
    """`FxqLevels`: from a byte to an integer, in digits of base 256."""

    _fields_ = (
        ("count", c_int32), ("identity", c_int32), ("zero", c_int32), ("unit", c_float),
        ("digit", c_uint8 * 256 * MAX_DIGITS),
    )  # fmt: skip


class LinearSpec(Structure):
    """`FxqLinear`: sizes, quantizers and what happens to the result."""

    _fields_ = (
        ("out_features", c_int64), ("in_features", c_int64), ("weight_bits", c_int32), ("epilogue", c_int32),
        ("ranges", c_int32), ("steps", c_int32), ("factor", c_float * MAX_RANGES),
        ("output", QuantizerSpec * MAX_RANGES), ("input", LevelsSpec),
    )  # fmt: skip


class AttentionSpec(Structure):
    """`FxqAttention`: heads, scales and the quantizers of softmax and result."""

    _fields_ = (
        ("heads", c_int64), ("head_size", c_int64), ("zero", c_int32 * 3), ("score_scale", c_float),
        ("value_scale", c_float), ("softmax", QuantizerSpec), ("softmax_levels", LevelsSpec), ("output", QuantizerSpec),
    )  # fmt: skip


class ChainHeader(Structure):
    """`FxqChain`: what a chain begins with."""

    _fields_ = (
        ("magic", c_uint32), ("version", c_uint32), ("count", c_int64), ("channels", c_int64), ("order", c_int64),
        ("order_rows", c_int64), ("parts", c_int64), ("returns", c_int64),
    )  # fmt: skip


class StepSpec(Structure):
    """`FxqStep`: one layer of a chain."""

    _fields_ = (
        ("kind", c_int32), ("input", c_int32), ("residual", c_int32), ("epsilon", c_float), ("offset", c_int64),
        ("bytes", c_int64), ("weight", c_int64), ("bias", c_int64), ("bias_groups", c_int64), ("bias_bytes", c_int64),
    )  # fmt: skip


_POINTER, _SIZE, _INT = c_void_p, c_int64, c_int32
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "fxq_abi": ([], _INT),
    "fxq_message": ([_INT], c_char_p),
    "fxq_best": ([], _INT),
    "fxq_runs": ([_INT], _INT),
    "fxq_name": ([_INT], c_char_p),
    "fxq_select": ([_INT], _INT),
    "fxq_selected": ([], _INT),
    "fxq_linear_bytes": ([POINTER(LinearSpec)], _SIZE),
    "fxq_linear_pack": (
        [POINTER(LinearSpec), _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE], _INT,
    ),
    "fxq_linear": ([_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _INT], _INT),
    "fxq_quantize": ([_POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _INT], _INT),
    "fxq_layer_norm": (
        [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, c_float, _POINTER, _SIZE, _INT], _INT,
    ),
    "fxq_norm": ([_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, c_float, _POINTER, _SIZE, _INT], _INT),
    "fxq_mean": ([_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _INT], _INT),
    "fxq_matmul": (
        [_POINTER, _INT, c_float, _POINTER, _SIZE, _POINTER, _SIZE, _INT, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE,
         _INT], _INT,
    ),
    "fxq_attention": (
        [_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _INT], _INT,
    ),
    "fxq_patches": (
        [_POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _INT], _INT,
    ),
    "fxq_tokens": (
        [_POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _INT], _INT,
    ),
    "fxq_open_memory": ([_POINTER, _SIZE, POINTER(c_void_p)], _INT),
    "fxq_close": ([_POINTER], None),
    "fxq_last_error": ([], c_char_p),
    "fxq_image_shape": ([_POINTER, POINTER(c_int64)], None),
    "fxq_output_count": ([_POINTER], _INT),
    "fxq_output_elements": ([_POINTER, _INT], _SIZE),
    "fxq_run": ([_POINTER, _POINTER, _SIZE, POINTER(c_void_p), _INT], _INT),
    "fxq_chain": ([_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _INT], _INT),
}  # fmt: skip


def library_in(folder: Path) -> ctypes.CDLL | str:
    """The library in a folder, or why there is none."""
    files = [path for suffix in ("so", "pyd", "dylib", "dll") for path in folder.glob(f"_kernels*.{suffix}")]
    note = folder / "why_absent.txt"  # left by setup.py
    if not files and note.exists():
        return (
            f"the integer kernels were not built when fxquant was installed: {note.read_text(encoding='utf-8')}; "
            "install fxquant from a wheel of this platform, or with g++ or clang in the variable CXX"
        )
    if not files:
        return (
            "the integer kernels were not built, since no C++ compiler was found when fxquant was installed: "
            "install g++ and then fxquant again"
        )
    try:
        found = ctypes.CDLL(str(files[0]))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        return f"the integer kernels in {files[0].name} cannot be loaded ({error}): install fxquant again"
    if found.fxq_abi() != ABI:
        return f"the integer kernels in {files[0].name} are of another version: install fxquant again"
    return found


@cache
def found() -> ctypes.CDLL | str:
    """The library of this installation, or why there is none; looked for once a process."""
    return library_in(Path(__file__).parent)


def library() -> ctypes.CDLL:
    """The loaded library. Raises BackendError, saying what to do, where it is absent."""
    loaded = found()
    if isinstance(loaded, str):
        raise BackendError(loaded)
    return loaded


def why_absent() -> str | None:
    """Why there is no library; None where there is one."""
    loaded = found()
    return loaded if isinstance(loaded, str) else None


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that this CPU can run, best last."""
    return tuple(_sets())


def _sets() -> dict[str, int]:
    """Numbers of the instruction sets that this CPU can run, by name, best last."""
    kernels = library()
    numbers = [number for number in range(kernels.fxq_best() + 1) if kernels.fxq_runs(number)]
    return {kernels.fxq_name(number).decode(): number for number in numbers}


def instruction_set() -> str:
    """The instruction set in use."""
    return str(library().fxq_name(library().fxq_selected()).decode())


def select_instruction_set(name: str | None = None) -> None:
    """Use this instruction set from now on, in the whole process; None: the best. Raises BackendError for others."""
    known = _sets()
    if name is not None and name not in known:
        raise BackendError(f"this CPU cannot run {name!r} kernels; it can run {', '.join(known)}")
    call("select", -1 if name is None else known[name])


def loop_depends_on_widths() -> bool:
    """Whether products of narrow weights and codes are faster than of wide ones on the instruction set in use."""
    return instruction_set() == "avx2"


def speed_of_widths() -> str:
    """One sentence: what widths do to speed on the instruction set in use. Raises BackendError without kernels."""
    name = instruction_set()
    if not loop_depends_on_widths():
        return f"products take as long at all widths on {name}"
    return (
        f"on {name} weights of 7 bits and less run one and a half times as fast as of 8 bits, "
        f"weights and activations of 4 bits about twice as fast"
    )


def call(function: str, *arguments: Any) -> None:
    """Run `fxq_<function>`; raises BackendError with the library's reason where it refuses."""
    status = getattr(library(), f"fxq_{function}")(*arguments)
    if status:
        raise BackendError(f"integer kernel '{function}' refuses: {library().fxq_message(status).decode()}")
