"""Tensors of a program, and where each number of a tensor of the graph lies in them.

What a graph only moves around (views, permutations, rolls, windows, slices, concatenations, padding) is not carried out
while it is exported; it is run on *places*, whole numbers that say which number of which stored tensor stands there:

    place = base of the tensor + index in it + image * 2^40,        -1 - byte: padding with that byte

So no spelling of a move has to be known, and any number of them becomes one operation, `Do.MOVE`, or none where numbers
stand already as they are wanted. Places are of two images. Whatever would mix images shows in them, and is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxquant.errors import ExportError
from fxquant.runtime.native.program import ARENA, BYTE, CONSTANT, FLOAT, IMAGE, INDEX, INPUTS, Do

IMAGES = 2
_SECOND_IMAGE, _CONSTANTS = 1 << 40, 1 << 50
_LARGEST_PIECE = 1 << 20
_TYPES = {torch.float32: FLOAT, torch.uint8: BYTE, torch.int32: INDEX}
_BYTES = {FLOAT: 4, BYTE: 1, INDEX: 4}


@dataclass(frozen=True)
class Stored:
    """A tensor of the program.

    Args:
        type: `FLOAT`, `BYTE` or `INDEX`.
        place: `IMAGE`, `CONSTANT` or `ARENA`.
        elements: of one image, or of a constant.
        base: the place of its first number.
        content: of a constant.
    """

    type: int
    place: int
    elements: int
    base: int
    content: bytes = field(default=b"", repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of one image, or of a constant."""
        return self.elements * _BYTES[self.type]


@dataclass(frozen=True)
class Operation:
    """A step of the program: see `program.h` for what inputs and sizes are.

    Args:
        kind: what it does.
        result: the number of the tensor that it writes.
        inputs: numbers of the tensors that it reads; -1 for none.
        sizes: as its kind has them.
        epsilon: of a norm.
        fill: of a move.
    """

    kind: Do
    result: int
    inputs: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    epsilon: float = 0.0
    fill: int = 0


@dataclass(frozen=True)
class Numbers:
    """A tensor of the graph. places: int64, of two images or of a constant. dtype: of what stands there."""

    places: Tensor
    dtype: torch.dtype


class Program:
    """Tensors and operations while they are collected; tensor 0 is the image."""

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        self.tensors: list[Stored] = []
        self.operations: list[Operation] = []
        self._next, self._next_constant = 0, _CONSTANTS
        self._known: dict[tuple[int, bytes], int] = {}
        self._add(FLOAT, IMAGE, math.prod(image_shape))
        self.image = Numbers(self._places(0, (IMAGES, *image_shape)), torch.float32)

    def constant(self, tensor: Tensor) -> int:
        """The number of a constant: float32, uint8 or int32; equal ones are stored once."""
        kind, content = _TYPES[tensor.dtype], tensor.detach().contiguous().cpu().numpy().tobytes()
        if (kind, content) not in self._known:
            self._known[kind, content] = self._add(kind, CONSTANT, tensor.numel(), content)
        return self._known[kind, content]

    def constant_numbers(self, tensor: Tensor) -> Numbers:
        """A constant as a tensor of the graph."""
        return Numbers(self._places(self.constant(tensor), tuple(tensor.shape)), tensor.dtype)

    @staticmethod
    def is_constant(numbers: Numbers) -> bool:
        """Whether all of these numbers are constants."""
        return bool((numbers.places >= _CONSTANTS).all())

    def content(self, numbers: Numbers) -> Tensor:
        """The values of float32 numbers that are constants."""
        places = numbers.places.reshape(-1).numpy()
        values = np.empty(len(places), np.float32)
        for number in np.unique(self._numbers_at(places)):
            tensor = self.tensors[number]
            inside = (places >= tensor.base) & (places < tensor.base + tensor.elements)
            values[inside] = np.frombuffer(tensor.content, np.float32)[places[inside] - tensor.base]
        return torch.from_numpy(values).reshape(numbers.places.shape)

    def operation(
        self,
        kind: Do,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        inputs: tuple[int, ...],
        sizes: tuple[int, ...] = (),
        epsilon: float = 0.0,
    ) -> Numbers:
        """Add an operation; returns what it gives.

        Args:
            kind: what it does.
            dtype: of the result.
            shape: of the result for two images.
            inputs: numbers of tensors, -1 for none.
            sizes: as the kind has them.
            epsilon: of a norm.
        """
        result = self._add(_TYPES[dtype], ARENA, math.prod(shape) // IMAGES)
        self.operations.append(Operation(kind, result, inputs, sizes, epsilon))
        return Numbers(self._places(result, shape), dtype)

    def stored(self, numbers: Numbers) -> int:
        """The number of a stored tensor in which these numbers stand one after the other, image by image.

        Raises ExportError where they cannot: images are mixed, or there are too many sources.
        """
        first = self._first_image(numbers.places)
        whole = self._number_at(int(first[0]))
        tensor = self.tensors[whole]
        is_all = tensor.elements == len(first) and tensor.place != CONSTANT
        if is_all and np.array_equal(first, np.arange(tensor.base, tensor.base + tensor.elements)):
            return whole
        return self._moved(first, _TYPES[numbers.dtype])

    @staticmethod
    def _first_image(places: Tensor) -> NDArray[np.int64]:
        """The places of the first image, one after the other; those of the second are the same but for the image."""
        flat = places.reshape(-1).numpy()
        if len(flat) == 0 or len(flat) % IMAGES:
            raise ExportError("it has no part that belongs to one image alone")
        first, second = flat.reshape(IMAGES, -1)
        is_of_first = (first >= 0) & (first < _SECOND_IMAGE)
        is_of_second = (first >= _SECOND_IMAGE) & (first < _CONSTANTS)
        if is_of_second.any() or not np.array_equal(first + is_of_first * _SECOND_IMAGE, second):
            raise ExportError("it depends on other images of the batch, or the batch is not its first dimension")
        return first

    def _moved(self, places: NDArray[np.int64], kind: int) -> int:
        """The number of a new tensor in which these places' numbers stand in this order, moved there in pieces."""
        is_padding = places < 0
        fills = np.unique(-1 - places[is_padding])
        numbers = np.unique(self._numbers_at(places[~is_padding])) if (~is_padding).any() else np.array([], int)
        if len(fills) > 1 or not 1 <= len(numbers) < INPUTS:
            raise ExportError(f"it is put together from {len(numbers)} tensors and {len(fills)} kinds of padding")
        indices = np.full(len(places), -1)
        ends = [0]
        for number in numbers:
            tensor = self.tensors[number]
            inside = (places >= tensor.base) & (places < tensor.base + tensor.elements)
            indices[inside] = places[inside] - tensor.base + ends[-1]
            ends.append(ends[-1] + tensor.elements)
        piece = _piece(indices, ends)
        index = self.constant(torch.from_numpy(np.where(indices < 0, -1, indices // piece)[::piece].astype(np.int32)))
        result = self._add(kind, ARENA, len(places))
        sizes, fill = (piece * _BYTES[kind],), int(fills[0]) if len(fills) else 0
        self.operations.append(Operation(Do.MOVE, result, (index, *map(int, numbers)), sizes, fill=fill))
        return result

    def _add(self, kind: int, place: int, elements: int, content: bytes = b"") -> int:
        base = self._next_constant if place == CONSTANT else self._next
        self.tensors.append(Stored(kind, place, elements, base, content))
        if place == CONSTANT:
            self._next_constant += elements
        else:
            self._next += elements
        return len(self.tensors) - 1

    def _places(self, number: int, shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors[number]
        places = torch.arange(tensor.base, tensor.base + tensor.elements)
        if tensor.place != CONSTANT:
            places = torch.cat([places + image * _SECOND_IMAGE for image in range(IMAGES)])
        return places.reshape(shape)

    def _number_at(self, place: int) -> int:
        return int(self._numbers_at(np.array([max(place, 0)]))[0])

    def _numbers_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the tensor in which each place is."""
        order = np.argsort([tensor.base for tensor in self.tensors])
        bases = np.array([tensor.base for tensor in self.tensors])[order]
        found: NDArray[np.int64] = order[np.searchsorted(bases, places, side="right") - 1]
        return found


def _piece(indices: NDArray[np.int64], ends: list[int]) -> int:
    """The most elements of which pieces can be moved as a whole. indices: in all sources, -1 for padding."""
    is_break = (np.diff(indices) != 1) & ~((indices[1:] < 0) & (indices[:-1] < 0))
    breaks = np.flatnonzero(is_break) + 1
    starts = indices[np.append(0, breaks)]
    found = math.gcd(len(indices), *map(int, breaks), *(int(start) for start in starts if start > 0), *ends)
    return found if found <= _LARGEST_PIECE else math.gcd(found, _LARGEST_PIECE)
