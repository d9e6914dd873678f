"""A program's bytes are run as they say, whatever torch's default type is, or refused before anything is written."""

from __future__ import annotations

import math
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.data.preprocessing import Preprocessing
from fxquant.errors import BackendError, ExportError
from fxquant.export.program_file import to_program
from fxquant.graph.capture.tracing import trace
from fxquant.runtime.native import library, program
from passes.lower.rewrites.run_float_rows import RunFloatRows
from passes.pipeline.contract import PassContext
from tests.lowering import needs_kernels
from tests.models import images

pytestmark = needs_kernels
SIZE, ROWS = 8, 64
NATIVE = Path(library.__file__).parent
HOW = Preprocessing((3, SIZE, SIZE), 0.875, (0.4, 0.5, 0.45), (0.2, 0.3, 0.25), "bicubic")


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, ROWS, 3).mean(1) * self.gain


class Doubled(nn.Module):
    """Two outputs, of a sum of two tensors that both are data."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((3, 1, 1), 2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + x.roll(1, 2), x * self.gain


def content_of(model: nn.Module, size: int = SIZE, **card: Any) -> bytearray:
    graph_module = trace(model.eval(), images(2, size))
    RunFloatRows().apply(graph_module, PassContext())
    graph_module.recompile()
    return bytearray(to_program(graph_module, card))


def sealed(content: bytearray) -> bytes:
    """With the checksum that belongs to it."""
    start = program.FileRecord.check.offset
    content[start : start + 4] = zlib.crc32(memoryview(content)[start + 4 :]).to_bytes(4, "little")
    return bytes(content)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_results_are_float32_whatever_torchs_default_is(dtype: torch.dtype) -> None:
    content, x = bytes(content_of(Mean())), images(5, SIZE)
    (wanted,) = program.run_program(content, x, [3])
    torch.set_default_dtype(dtype)
    try:
        (found,) = program.run_program(content, x, [3])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.quick
def test_other_images_or_outputs_than_the_programs_are_refused() -> None:
    content, x = bytes(content_of(Mean())), images(2, SIZE)
    for elements in ([2], [4], [], [3, 3]):
        with pytest.raises(BackendError, match=r"outputs have \[3\] numbers for an image"):
            program.run_program(content, x, elements)
    for other in (images(2, SIZE + 1), x[:, :1], x[0]):
        with pytest.raises(BackendError, match=r"takes images \(B, 3, 8, 8\), not"):
            program.run_program(content, other, [3])
    for other in (x.double(), x.to("meta")):
        with pytest.raises(BackendError, match="the batch of images is"):
            program.run_program(content, other, [3])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("known", 2), ("interpolation", 3), ("resize", (0, 9)), ("resize", (9, 2**16 + 1)), ("std", (1.0, 0.0, 1.0)),
        ("mean", (math.nan, 0.0, 0.0)), ("known", 0),
    ],
)  # fmt: skip
def test_preprocessing_that_is_none_is_refused(field: str, value: Any) -> None:
    content = content_of(Mean(), preprocessing=HOW.to_dict())
    head = program.FileRecord.from_buffer(content)
    kind = dict(program.PreprocessingRecord._fields_)[field]
    setattr(head.preprocessing, field, kind(*value) if isinstance(value, tuple) else value)
    with pytest.raises(BackendError, match="its preprocessing is none"):
        program.run_program(sealed(content), images(1, SIZE), [3])


@pytest.mark.quick
def test_a_file_says_nothing_of_pictures_that_lose_their_proportions() -> None:
    for mode, is_known in (("center", 1), ("squash", 0)):
        content = content_of(Mean(), preprocessing=HOW.with_options(crop_mode=mode).to_dict())
        assert program.FileRecord.from_buffer(content).preprocessing.known == is_known


@pytest.mark.quick
@pytest.mark.parametrize("channels", [2, 64])
def test_preprocessing_is_of_one_channel_or_three(channels: int) -> None:
    content = content_of(Mean(), preprocessing=HOW.to_dict())
    program.FileRecord.from_buffer(content).image[0] = channels
    with pytest.raises(BackendError, match="its preprocessing is none"):
        program.run_program(sealed(content), images(1, SIZE), [3])
    card = HOW.to_dict() | {"input_size": [channels, SIZE, SIZE], "mean": [0.5] * channels, "std": [0.5] * channels}
    with pytest.raises(ExportError, match="preprocessing cannot be written"):
        content_of(Mean(), preprocessing=card)


@pytest.mark.quick
def test_a_mean_of_more_numbers_than_can_be_is_refused() -> None:
    content, large, means = content_of(Mean()), 2**24, 3 * 2**8
    head = program.FileRecord.from_buffer(content)
    tensors = (program.TensorRecord * head.tensors).from_buffer(content, head.tensors_at)
    operation = program.OperationRecord.from_buffer(content, head.operations_at)
    output = program.OutputRecord.from_buffer(content, head.outputs_at)
    assert (operation.kind, operation.sizes[:]) == (program.Do.MEAN, [ROWS, 3])
    head.image[:] = large, means, 1
    tensors[0].elements, tensors[operation.result].elements = large * means, means
    tensors[output.tensor].elements, head.arena_bytes = means, 2**20
    operation.sizes[:] = large, large
    output.rank, output.shape[0] = 1, means
    with pytest.raises(BackendError, match="operation 0 does not fit its tensors"):
        program.run_program(sealed(content), images(1, SIZE), [means])


@pytest.mark.quick
def test_sums_of_large_images_and_images_with_nan_are_as_in_torch() -> None:
    size = 96  # more than one block of numbers
    content, x, elements = bytes(content_of(Doubled(), size)), images(3, size), [3 * size * size] * 2
    x[1, 2, 3, 4] = math.nan
    for found, wanted in zip(program.run_program(content, x, elements), Doubled()(x), strict=True):
        assert torch.equal(found[::2], wanted.detach().flatten(1)[::2])
        assert found[1].isnan().all()


WITHOUT_MEMORY = """
#include <cstdio>
#include <cstdlib>
#include <new>
#include "fxquant.h"

static bool is_empty = false;
void *operator new(size_t bytes) {
    void *found = is_empty ? nullptr : std::malloc(bytes);
    if (!found) throw std::bad_alloc();
    return found;
}
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, size_t) noexcept { std::free(memory); }
alignas(64) static char content[64];

int main() {
    FxqModel *model;
    is_empty = true;
    if (fxq_open_memory(content, 64, &model) != FXQ_MEMORY || fxq_open("none.fxm", &model) != FXQ_MEMORY) return 1;
    std::puts(fxq_last_error());
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_no_memory_at_all_is_a_status_and_no_exception(tmp_path: Path) -> None:
    (kernels,) = NATIVE.glob("_kernels*.so")
    (tmp_path / "main.cpp").write_text(WITHOUT_MEMORY)
    command = ["c++", f"-I{NATIVE}", tmp_path / "main.cpp", kernels, f"-Wl,-rpath,{NATIVE}", "-o", tmp_path / "main"]
    subprocess.run(command, check=True)
    ran = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "fxq_open: out of memory\n")
