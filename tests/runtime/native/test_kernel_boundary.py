"""What the operators are given may come from anybody: they refuse it or compute, and never reach beyond buffers.

Memory errors themselves are looked for by `run` beside this file, under sanitizers; here guard bytes would show stray
writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import BackendError
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import byte_code
from fxquant.runtime.integer.lowered import (
    AttentionCodes,
    Epilogue,
    IntegerAttention,
    IntegerLinear,
    IntegerMatmul,
    ToCodes,
)
from fxquant.runtime.native import library, operators
from fxquant.runtime.simulated import QuantizedLinear
from tests.lowering import needs_kernels

pytestmark = [needs_kernels, pytest.mark.quick]

CODE = byte_code(UniformQuantizer(8, 0.05))
assert CODE is not None


def layer(out: int = 20, inner: int = 12, bits: int = 3) -> IntegerLinear:
    weight = torch.randn(out, inner)
    source = QuantizedLinear(weight, torch.randn(out), UniformQuantizer(bits, torch.full((out, 1), 0.3)), None)
    return IntegerLinear(source, CODE, Epilogue(library.CODES, (CODE,), (1.0,)))


EDITS = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=6)


def edited(tensor: Tensor, edits: list[tuple[int, int]]) -> Tensor:
    changed = tensor.clone()
    for place, value in edits:
        changed[place % len(changed)] = value
    return changed


@settings(max_examples=150, deadline=None)
@given(edits=EDITS, header_only=st.booleans(), cut=st.integers(-3, 3), rows=st.integers(0, 5))
def test_damaged_layouts_are_refused_or_computed(
    edits: list[tuple[int, int]], header_only: bool, cut: int, rows: int
) -> None:
    layout = layer().layout
    header = ctypes.sizeof(library.LinearSpec) + 8
    changed = torch.cat([edited(layout[:header], edits), layout[header:]]) if header_only else edited(layout, edits)
    changed = torch.cat([changed, torch.zeros(max(cut, 0), dtype=torch.uint8)])[: len(layout) + cut]
    codes, guarded = torch.zeros(rows, 12, dtype=torch.uint8), torch.full((rows * 20 + 64,), 77, dtype=torch.uint8)
    status = library.library().fxq_linear(
        changed.data_ptr(), len(changed), codes.data_ptr() or layout.data_ptr(), codes.numel(), rows, None, 0,
        guarded.data_ptr(), rows * 20, 1,
    )  # fmt: skip
    assert (guarded[rows * 20 :] == 77).all()
    if cut:
        assert status != 0
    elif not edits:
        assert status == 0


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_specs_are_refused_or_computed(data: st.DataObject) -> None:
    attention = IntegerAttention(2, 3, AttentionCodes((CODE,) * 3, CODE, CODE))
    qkv = torch.zeros(2, 5, 18, dtype=torch.uint8)
    for call, spec in (
        (lambda changed: operators.attention(qkv, changed), attention.spec),
        (lambda changed: operators.quantize(torch.randn(7), changed), ToCodes(CODE).spec),
        (lambda changed: operators.matmul(qkv, qkv, changed, 128, 0.1, True), IntegerMatmul(CODE, CODE).levels),
    ):
        changed = edited(spec, data.draw(EDITS))
        with contextlib.suppress(BackendError):
            assert call(changed).numel() > 0


def test_wrong_tensors_are_refused_by_name() -> None:
    module, codes = layer(), torch.zeros(3, 12, dtype=torch.uint8)
    matmul = IntegerMatmul(CODE, CODE)
    attention = IntegerAttention(2, 3, AttentionCodes((CODE,) * 3, CODE, CODE))
    qkv = torch.zeros(2, 5, 18, dtype=torch.uint8)
    with pytest.raises(BackendError, match=r"codes is torch.float32 on cpu; the kernel reads torch.uint8"):
        module(codes.float())
    with pytest.raises(BackendError, match="a size is out of range, or a buffer"):
        module(codes[:, :11])
    with pytest.raises(BackendError, match="residual has 5 elements, expected 60"):
        operators.linear(codes, module.layout, 20, True, torch.zeros(5))
    with pytest.raises(BackendError, match="cannot be multiplied"):
        operators.matmul(codes[None], codes[None], matmul.levels, 128, 0.1, False)
    with pytest.raises(BackendError, match="not the bytes of a QuantizerSpec"):
        operators.quantize(torch.zeros(3), torch.zeros(5, dtype=torch.uint8))
    for bias in (torch.zeros(1, 3, 5, 5), torch.zeros(3, 2, 5, 5), torch.zeros(0, 2, 5, 5)):
        with pytest.raises(BackendError, match=r"bias .* does not fit 2 images of 2 heads, 5 tokens"):
            operators.attention(qkv, attention.spec, bias)
    with pytest.raises(BackendError, match="this CPU cannot run 'amx' kernels"):
        library.select_instruction_set("amx")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_package_installs_without_a_working_compiler(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"],
        cwd=root, env={"PATH": "/nonexistent", "CC": "no-such-compiler", "CXX": "no-such-compiler"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("lib/**/_kernels*"))
    assert result.stderr.rstrip().splitlines()[-1].startswith("fxquant installs without its integer kernels: no C++")
    (folder,) = (note.parent for note in tmp_path.glob("lib/**/why_absent.txt"))
    assert "not built when fxquant was installed: no C++ compiler that works was found" in str(
        library.library_in(folder)
    )


def test_a_missing_library_says_what_to_do(tmp_path: Path) -> None:
    assert "no C++ compiler was found when fxquant was installed" in str(library.library_in(tmp_path))
    (tmp_path / "_kernels.so").write_bytes(b"no library")
    assert "cannot be loaded" in str(library.library_in(tmp_path))
