"""Tensors as the kernels take them: checked, contiguous, by their addresses."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import BackendError
from fxquant.runtime.native.library import call


def readable(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """The tensor as the kernels read it: contiguous, on the CPU.

    Args:
        tensor: of any shape.
        dtype: what the kernels read.
        what: what an error calls the tensor.

    Raises BackendError for another dtype or device.
    """
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        raise BackendError(f"{what} is {tensor.dtype} on {tensor.device}; the kernel reads {dtype} on the CPU")
    return tensor.contiguous()


def spec_pointer(tensor: Tensor, kind: type[ctypes.Structure], what: str) -> int:
    """The address of the bytes of a structure.

    Args:
        tensor: uint8 (sizeof,).
        kind: which structure.
        what: what an error calls the tensor.

    Raises BackendError for anything else.
    """
    if tensor.dtype != torch.uint8 or tensor.numel() != ctypes.sizeof(kind) or not tensor.is_contiguous():
        raise BackendError(f"{what} is not the bytes of a {kind.__name__}")
    return tensor.data_ptr()


def vector(tensor: Tensor | None, size: int, what: str) -> Tensor | None:
    """float32 numbers as the kernels read them, or None for none.

    Args:
        tensor: float32, of any shape.
        size: how many numbers it has to have.
        what: what an error calls it.

    Raises BackendError for another size.
    """
    if tensor is None:
        return None
    if tensor.numel() != size:
        raise BackendError(f"{what} has {tensor.numel()} elements, expected {size}")
    return readable(tensor, torch.float32, what)


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's numbers; None for none."""
    return None if tensor is None else tensor.data_ptr()


def filled(out: Tensor, kernel: str, *arguments: Any) -> Tensor:
    """The result, written by a kernel unless it is empty: kernels take no memory of no size.

    Args:
        out: where the kernel writes.
        kernel: name of the function in the library, without `fxq_`.
        *arguments: what it is given.

    Raises BackendError where the kernel refuses.
    """
    if out.numel():
        call(kernel, *arguments)
    return out
