"""Programs for the C library: the bits of the lowered model, whatever moves its numbers, or a refusal by name."""

from __future__ import annotations

import ctypes
import math
import random
import zlib

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from fxquant.errors import BackendError, ExportError
from fxquant.export.program_file import arena_offsets, to_program
from fxquant.export.program_graph import program_of
from fxquant.export.program_tensors import Numbers, Program
from fxquant.graph.capture.tracing import trace
from fxquant.graph.output_tree import leaves
from fxquant.runtime.native import program as records
from passes.lower.rewrites.run_float_rows import RunFloatRows
from passes.pipeline.contract import PassContext
from tests.lowering import needs_kernels
from tests.models import compiled, images

pytestmark = needs_kernels
SIZE = 8


class Moves(nn.Module):
    """Windows, rolls, padding, joins, sums, a norm and a mean; a tree of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.LayerNorm(3)
        self.token = nn.Parameter(torch.randn(1, 1, 3, generator=generator))
        self.gain = nn.Parameter(torch.randn(3, generator=generator))
        self.by_row = nn.Parameter(torch.randn(66, 1, generator=generator))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = functional.pad(torch.roll(x.permute(0, 2, 3, 1), (-1, 2), (1, 2)), (0, 0, 0, 2, 0, 1))
        windows = y.view(-1, 3, 3, 2, 5, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 15, 3)
        back = windows.view(-1, 3, 2, 3, 5, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, 10, 3)[:, :8, :8].flatten(1, 2)
        first, second = (back * self.gain).chunk(2, dim=1)
        joined = torch.cat([self.token.expand(x.shape[0], -1, -1), second, first + second[:, :1], first[:, 3:4]], 1)
        tokens = self.norm(joined * self.by_row) / 3
        return {"mean": tokens[:, 1:].mean(1), "tokens": tokens}


def moved_graph() -> GraphModule:
    graph_module = trace(Moves().eval(), images(2, SIZE))
    RunFloatRows().apply(graph_module, PassContext())
    graph_module.recompile()
    return graph_module


def shapes_of(graph_module: GraphModule) -> list[tuple[int, ...]]:
    return [shape for _, shape in program_of(graph_module)[1]]


def run(content: bytes, shapes: list[tuple[int, ...]], x: Tensor) -> list[Tensor]:
    found = records.run_program(content, x, [math.prod(shape) for shape in shapes])
    return [part.reshape(-1, *shape) for part, shape in zip(found, shapes, strict=True)]


def test_moves_sums_norms_and_means_have_the_bits_of_the_graph() -> None:
    graph_module, x = moved_graph(), images(5, SIZE, seed=7)
    content = to_program(graph_module)
    assert b"\0mean\0tokens\0" in content  # their names
    found = run(content, shapes_of(graph_module), x)
    with torch.inference_mode():
        wanted = leaves(graph_module(x))
    assert [tuple(part.shape) for part in found] == [(5, 3), (5, 66, 3)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(wanted, found, strict=True))


@pytest.mark.parametrize("architecture", ["vit", "deit3", "beit"])
def test_models_have_the_bits_of_the_lowered_one(architecture: str) -> None:
    low = compiled(architecture).lowered("cpu-native")
    size = low.border.image_shape[1]
    x = images(3, size, seed=9)
    x[1, 2, 3, 4] = math.nan
    (found,) = run(to_program(low.graph_module), shapes_of(low.graph_module), x)
    with torch.inference_mode():
        assert torch.equal(found.view(torch.int32)[::2], low(x).contiguous().view(torch.int32)[::2])
    assert found[1].isnan().all()


def test_what_torch_computes_is_refused_by_its_layer() -> None:
    with pytest.raises(ExportError, match=r"'patch_embed.proj' cannot run without Python: QuantizedConv2d"):
        to_program(compiled("vit").graph_module)


class Absolute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gain).abs()


def test_a_function_of_torch_is_refused_by_its_name() -> None:
    with pytest.raises(ExportError, match=r"'abs_1' cannot run without Python: 'abs' is computed by torch"):
        to_program(trace(Absolute(), images(2, SIZE)))


@pytest.mark.quick
def test_a_batch_whose_images_are_mixed_is_refused() -> None:
    program = Program((3, 2, 2))
    for mixed in (program.image.places.flip(0), program.image.places.transpose(0, 1), program.image.places[:1]):
        with pytest.raises(ExportError, match=r"other images of the batch|belongs to one image"):
            program.stored(Numbers(mixed, torch.float32))


@pytest.mark.quick
def test_numbers_that_stand_as_they_are_wanted_are_not_moved() -> None:
    program = Program((3, 2, 2))
    assert program.stored(Numbers(program.image.places.view(-1, 4, 3), torch.float32)) == 0
    assert program.operations == []
    program.stored(Numbers(program.image.places.flip(1), torch.float32))
    (move,) = program.operations
    assert move.sizes == (16,)  # whole channels


def test_what_is_alive_together_does_not_share_memory() -> None:
    program, outputs = program_of(moved_graph())
    offsets, arena_bytes = arena_offsets(program, [number for number, _ in outputs])
    last = {number: len(program.operations) for number, _ in outputs}
    for index, operation in reversed(list(enumerate(program.operations))):
        for number in operation.inputs:
            last.setdefault(number, index)
    first = {operation.result: index for index, operation in enumerate(program.operations)}
    spans = [(offsets[n], offsets[n] + program.tensors[n].nbytes, first[n], last[n]) for n in first]
    for index, (start, end, begins, ends) in enumerate(spans):
        assert end <= arena_bytes
        for other_start, other_end, other_begins, other_ends in spans[:index]:
            is_beside = begins <= other_ends and other_begins <= ends
            assert not is_beside or end <= other_start or other_end <= start
    assert arena_bytes < sum(end - start for start, end, *_ in spans)


def sealed(content: bytearray) -> bytes:
    """With the checksum that belongs to it."""
    start = records.FileRecord.check.offset
    content[start : start + 4] = zlib.crc32(memoryview(content)[start + 4 :]).to_bytes(4, "little")
    return bytes(content)


def test_a_damaged_file_is_refused() -> None:
    graph_module = moved_graph()
    content, shapes, x = to_program(graph_module), shapes_of(graph_module), images(1, SIZE)
    for damaged, message in (
        (content[:-64], "cut"),
        (content[:100], "shorter"),
        (bytes(64) + content[64:], "no file that"),
        (content[:-1] + bytes([content[-1] ^ 1]), "checksum"),
        (content[:4] + b"\x63" + content[5:], "another version"),
    ):
        with pytest.raises(BackendError, match=message):
            run(damaged, shapes, x)


def test_a_file_that_lies_is_refused_or_stays_within_its_memory() -> None:
    graph_module = moved_graph()
    content, shapes = to_program(graph_module), shapes_of(graph_module)
    x, chance = images(2, SIZE), random.Random(0)
    head = records.FileRecord.from_buffer_copy(content)
    refused, last_record = 0, head.outputs_at + ctypes.sizeof(records.OutputRecord)
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 2)):
            at = chance.randrange(16, last_record) // 4 * 4
            value = chance.choice([0, 1, -1, 64, 2**31 - 1, -(2**31), chance.randint(-50, 5000)])
            damaged[at : at + 4] = value.to_bytes(4, "little", signed=True)
        try:
            run(sealed(damaged), shapes, x)
        except BackendError:
            refused += 1
    assert refused > 1000
