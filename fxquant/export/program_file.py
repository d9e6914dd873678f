"""A lowered model as the file that libfxquant runs, `.fxm`: a program of integer kernels, without Python or torch.

`fxquant/runtime/native/program.h` describes the file, `fxquant/runtime/native/fxquant.h` the library. Where results lie
is planned here: each has a place in one arena from the operation that writes it to the last one that reads it; the
largest are placed first, each as low as those beside it in time allow. A file is run before it is returned, and held
against the lowered model bit by bit.
"""

from __future__ import annotations

import ctypes
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fxquant.errors import ExportError
from fxquant.export.onnx_file import output_names
from fxquant.export.program_graph import program_of
from fxquant.export.program_tensors import Program
from fxquant.graph.notes import IMAGE_SHAPE
from fxquant.graph.output_tree import leaves
from fxquant.runtime.known_answers import answer_images_for
from fxquant.runtime.native import program as records
from fxquant.runtime.native.library import LAYOUT_VERSION

SUFFIX = ".fxm"
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_MOST_DIMENSIONS = records.RANK


def to_program(graph_module: GraphModule, card: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a program's file.

    Args:
        graph_module: lowered to "cpu-native"; it is not changed.
        card: where the file takes the model's name from, "model", and its preprocessing, "preprocessing", where the
            card has one.

    Raises ExportError, naming the node, for what only torch computes; also where the file would not give the same bits.
    """
    program, outputs = program_of(graph_module)
    card = card or {}
    names = output_names(graph_module)
    for name, (_, shape) in zip(names, outputs, strict=True):
        if len(shape) > _MOST_DIMENSIONS:
            raise ExportError(f"output '{name}' has {len(shape)} dimensions, and a file has {_MOST_DIMENSIONS} at most")
    preprocessing = _preprocessing(card.get("preprocessing"))
    image_shape = tuple(IMAGE_SHAPE.of(graph_module))
    content = _file(program, image_shape, outputs, names, str(card.get("model", "")), preprocessing)
    _check(content, graph_module, [math.prod(shape) for _, shape in outputs])
    return content


def _check(content: bytes, graph_module: GraphModule, elements: Sequence[int]) -> None:
    """Run the file beside the graph. Raises ExportError where a bit differs."""
    images = answer_images_for(graph_module)
    with torch.no_grad():
        wanted = leaves(graph_module(images))
    found = records.run_program(content, images, elements)
    for index, (ours, theirs) in enumerate(zip(wanted, found, strict=True)):
        if not torch.equal(ours.flatten(1).contiguous().view(torch.int32), theirs.view(torch.int32)):
            raise ExportError(
                f"the C library does not give the bits of the lowered model in output {index}: please report this "
                "model as a fault"
            )


def arena_offsets(program: Program, outputs: Sequence[int]) -> tuple[dict[int, int], int]:
    """Where each result lies in the arena, in bytes for one image, and how large the arena is.

    Args:
        program: with all its operations.
        outputs: numbers of the tensors that are read after the last of them.
    """
    last = {operation.result: index for index, operation in enumerate(program.operations)}
    first = dict(last)
    for index, operation in enumerate(program.operations):
        last.update({number: index for number in operation.inputs if number in last})
    last.update({number: len(program.operations) for number in outputs if number in last})
    offsets: dict[int, int] = {}
    for number in sorted(first, key=lambda number: -program.tensors[number].nbytes):
        beside = [other for other in offsets if first[other] <= last[number] and first[number] <= last[other]]
        offset, size = 0, program.tensors[number].nbytes
        for other in sorted(beside, key=offsets.__getitem__):
            if offset + size <= offsets[other]:
                break
            offset = max(offset, _aligned(offsets[other] + program.tensors[other].nbytes))
        offsets[number] = offset
    ends = (offset + program.tensors[number].nbytes for number, offset in offsets.items())
    return offsets, _aligned(max(ends, default=0))


def _aligned(size: int) -> int:
    return -(-size // records.ALIGNMENT) * records.ALIGNMENT


def _file(
    program: Program,
    image_shape: tuple[int, ...],
    outputs: Sequence[tuple[int, tuple[int, ...]]],
    names: Sequence[str],
    model: str,
    preprocessing: records.PreprocessingRecord,
) -> bytes:
    offsets, arena_bytes = arena_offsets(program, [number for number, _ in outputs])
    texts, places = _texts([model, *names])
    head = records.FileRecord(
        records.MAGIC, records.VERSION, LAYOUT_VERSION, image=image_shape, arena_bytes=arena_bytes,
        tensors=len(program.tensors), operations=len(program.operations), outputs=len(outputs), text_bytes=len(texts),
        name=places[0], preprocessing=preprocessing,
    )  # fmt: skip
    head.tensors_at = _aligned(ctypes.sizeof(head))
    head.operations_at = _aligned(head.tensors_at + len(program.tensors) * ctypes.sizeof(records.TensorRecord))
    head.outputs_at = _aligned(head.operations_at + len(program.operations) * ctypes.sizeof(records.OperationRecord))
    head.text_at = _aligned(head.outputs_at + len(outputs) * ctypes.sizeof(records.OutputRecord))
    end = _aligned(head.text_at + len(texts))
    parts = {head.text_at: texts}
    for index, tensor in enumerate(program.tensors):
        record = records.TensorRecord(tensor.type, tensor.place, tensor.elements, offsets.get(index, 0))
        if tensor.place == records.CONSTANT:
            record.offset, parts[end] = end, tensor.content
            end = _aligned(end + tensor.nbytes)
        parts[head.tensors_at + index * ctypes.sizeof(record)] = bytes(record)
    for index, operation in enumerate(program.operations):
        inputs = (*operation.inputs, *[-1] * (records.INPUTS - len(operation.inputs)))
        step = records.OperationRecord(
            operation.kind, operation.result, inputs, (*operation.sizes,), operation.epsilon, operation.fill
        )
        parts[head.operations_at + index * ctypes.sizeof(step)] = bytes(step)
    for index, ((number, shape), place) in enumerate(zip(outputs, places[1:], strict=True)):
        output = records.OutputRecord(number, len(shape), shape, place)
        parts[head.outputs_at + index * ctypes.sizeof(output)] = bytes(output)
    head.bytes = end
    content = bytearray(end)
    for offset, part in ({0: bytes(head)} | parts).items():
        content[offset : offset + len(part)] = part
    checked_from = records.FileRecord.check.offset + 4
    head.check = zlib.crc32(memoryview(content)[checked_from:])
    content[: ctypes.sizeof(head)] = bytes(head)
    return bytes(content)


def _texts(texts: Sequence[str]) -> tuple[bytes, list[int]]:
    """Texts one after the other, each with a zero at its end, and where each begins."""
    found, places = b"", []
    for text in texts:
        places.append(len(found))
        found += text.replace("\0", " ").encode() + b"\0"
    return found, places


def _preprocessing(card: Any) -> records.PreprocessingRecord:
    """What a card says of how pictures become images (`fxquant.data.preprocessing.Preprocessing`), as in timm."""
    if card is None:
        return records.PreprocessingRecord()
    try:
        if card.get("crop_mode", "center") != "center":  # the file knows pictures that keep their proportions alone
            return records.PreprocessingRecord()
        channels, *size = card["input_size"]
        resize = tuple(math.floor(side / card["crop_pct"]) for side in size)
        mean, std = (tuple(map(float, card[key])) for key in ("mean", "std"))
        interpolation = _INTERPOLATIONS.index(card["interpolation"])
        if channels not in (1, 3) or len(mean) != channels or len(std) != channels or 0 in std:
            raise ValueError
        return records.PreprocessingRecord(1, interpolation, resize, mean, std)
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ExportError(f"the card's preprocessing cannot be written: {card!s:.200}") from error
