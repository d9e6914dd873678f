"""The records of a program's file, as `program.h` has them, and running such a file's bytes through the C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_uint32
from enum import IntEnum

import torch
from torch import Tensor

from fxquant.errors import BackendError
from fxquant.runtime.native.given_tensors import readable
from fxquant.runtime.native.library import library

MAGIC, VERSION = 0x4D515846, 1
ALIGNMENT, INPUTS, RANK = 64, 6, 8
FLOAT, BYTE, INDEX = range(3)
IMAGE, CONSTANT, ARENA = range(3)


class Do(IntEnum):
    """What an operation does."""

    QUANTIZE = 0
    MOVE = 1
    LINEAR = 2
    ATTENTION = 3
    LAYER_NORM = 4
    NORM = 5
    CHAIN = 6
    MEAN = 7
    ADD = 8
    MULTIPLY = 9
    DIVIDE = 10


class PreprocessingRecord(Structure):
    """`FxqPreprocessing`: how a picture becomes the model's input."""

    _fields_ = (
        ("known", c_int32), ("interpolation", c_int32), ("resize", c_int32 * 2), ("mean", c_float * 3),
        ("std", c_float * 3),
    )  # fmt: skip


class FileRecord(Structure):
    """`FxqFile`: what a file begins with."""

    _fields_ = (
        ("magic", c_uint32), ("version", c_uint32), ("layouts", c_uint32), ("check", c_uint32), ("bytes", c_int64),
        ("image", c_int64 * 3), ("arena_bytes", c_int64), ("tensors", c_int64), ("operations", c_int64),
        ("outputs", c_int64), ("tensors_at", c_int64), ("operations_at", c_int64), ("outputs_at", c_int64),
        ("text_at", c_int64), ("text_bytes", c_int64), ("name", c_int64), ("preprocessing", PreprocessingRecord),
    )  # fmt: skip


class TensorRecord(Structure):
    """`FxqTensor`: numbers, and where they lie."""

    _fields_ = (("type", c_int32), ("place", c_int32), ("elements", c_int64), ("offset", c_int64))


class OperationRecord(Structure):
    """`FxqOperation`: one step of the program."""

    _fields_ = (
        ("kind", c_int32), ("result", c_int32), ("input", c_int32 * INPUTS), ("sizes", c_int64 * 2),
        ("epsilon", c_float), ("fill", c_int32),
    )  # fmt: skip


class OutputRecord(Structure):
    """`FxqOutput`: a tensor that the model returns, its shape and name."""

    _fields_ = (("tensor", c_int32), ("rank", c_int32), ("shape", c_int64 * RANK), ("name", c_int64))


def run_program(content: bytes, images_bchw: Tensor, elements: Sequence[int]) -> tuple[Tensor, ...]:
    """What a file's program gives for images, as the C library would: float32 (B, elements) for each output.

    Args:
        content: the bytes of the file.
        images_bchw: float32 (B, C, H, W), as the model takes them.
        elements: how many numbers each output has for one image.

    Raises BackendError, with the library's reason, where the program is refused or fails, and where it takes other
    images or gives other outputs.
    """
    kernels = library()
    memory = torch.empty(len(content) + ALIGNMENT, dtype=torch.uint8, device="cpu")
    memory = memory[-memory.data_ptr() % ALIGNMENT :][: len(content)]
    memory.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    model = ctypes.c_void_p()
    if kernels.fxq_open_memory(memory.data_ptr(), len(content), ctypes.byref(model)):
        raise BackendError(f"the C library refuses the program: {kernels.fxq_last_error().decode()}")
    try:
        images = readable(images_bchw, torch.float32, "the batch of images")
        shape = (c_int64 * 3)()
        kernels.fxq_image_shape(model, shape)
        if images.ndim != 4 or tuple(images.shape[1:]) != tuple(shape):
            raise BackendError(
                f"the program takes images (B, {shape[0]}, {shape[1]}, {shape[2]}), not {tuple(images.shape)}"
            )
        given = [kernels.fxq_output_elements(model, index) for index in range(kernels.fxq_output_count(model))]
        if list(elements) != given:
            raise BackendError(f"the program's outputs have {given} numbers for an image, not {list(elements)}")
        outputs = tuple(torch.empty(len(images), count, dtype=torch.float32, device="cpu") for count in elements)
        addresses = (ctypes.c_void_p * len(outputs))(*(output.data_ptr() for output in outputs))
        if kernels.fxq_run(model, images.data_ptr(), len(images), addresses, torch.get_num_threads()):
            raise BackendError(f"the C library cannot run the program: {kernels.fxq_last_error().decode()}")
    finally:
        kernels.fxq_close(model)
    return outputs
