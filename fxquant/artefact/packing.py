"""Integer codes of 2 to 8 bits as one contiguous stream of bits, and back, exactly.

Code i, less the lowest code, occupies bits i b .. (i+1) b - 1 of the stream; bit k of the stream is bit k mod 8 of byte
k div 8 (least significant first). So n codes take ceil(n b / 8) bytes, odd widths included, and eight codes are always
b whole bytes: the lower b bytes of one 64-bit word, which is how they are computed. Where rows have widths of their
own, there is such a stream for each width, one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fxquant.errors import ArtefactError

WIDTHS = range(2, 9)
_CODES_PER_WORD = 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int, lowest: int) -> Tensor:
    """Pack integer codes of any shape, all in lowest .. lowest + 2^bits - 1, into uint8 (ceil(n bits / 8),).

    Args:
        codes: integers of any shape.
        bits: width of the codes, 2 to 8.
        lowest: the code that is stored as 0.

    Raises ArtefactError for a width outside 2 to 8 and for codes that do not fit the width.
    """
    _check_width(bits)
    flat = codes.detach().cpu().flatten().numpy()
    if flat.size and not (lowest <= int(flat.min()) and int(flat.max()) < lowest + 2**bits):
        raise ArtefactError(
            f"codes {flat.min()} .. {flat.max()} do not fit {bits} bits starting at {lowest}: "
            "quantize with the quantizer whose codes these are"
        )
    lanes = np.zeros((-(-flat.size // _CODES_PER_WORD), _CODES_PER_WORD), np.uint8)
    lanes.reshape(-1)[: flat.size] = flat.astype(np.int16) - lowest
    words = np.zeros(len(lanes), "<u8")
    for lane in range(_CODES_PER_WORD):
        words |= lanes[:, lane].astype(np.uint64) << np.uint64(lane * bits)
    stream = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return torch.from_numpy(stream[: packed_bytes(flat.size, bits)].copy())


def unpack(packed: Tensor, count: int, bits: int, lowest: int) -> Tensor:
    """The `count` codes in a stream written by `pack`: int8 (count,), or int16 where they exceed 127.

    Args:
        packed: uint8 (ceil(count bits / 8),). Nothing is allocated before its length is found to fit.
        count: how many codes the stream has.
        bits: width of the codes, 2 to 8.
        lowest: the code that is stored as 0.

    Raises ArtefactError for a width outside 2 to 8 and a length that does not fit.
    """
    _check_width(bits)
    if count < 0 or packed.dtype != torch.uint8 or tuple(packed.shape) != (packed_bytes(count, bits),):
        raise ArtefactError(
            f"{count} codes of {bits} bits are uint8 ({packed_bytes(count, bits)},), "
            f"not {packed.dtype} {tuple(packed.shape)}"
        )
    words_needed = -(-count // _CODES_PER_WORD)
    stream = np.zeros(words_needed * bits, np.uint8)
    stream[: len(packed)] = packed.cpu().numpy()
    padded = np.zeros((words_needed, 8), np.uint8)
    padded[:, :bits] = stream.reshape(-1, bits)
    words = padded.reshape(-1).view("<u8")
    codes = np.empty((words_needed, _CODES_PER_WORD), np.int8 if lowest + 2**bits <= 128 else np.int16)
    mask, shift = np.uint64(2**bits - 1), np.uint64(bits)
    for lane in range(_CODES_PER_WORD):
        codes[:, lane] = (words & mask).astype(np.int16) + lowest
        words >>= shift
    return torch.from_numpy(codes.reshape(-1)[:count])


def pack_rows(codes: Tensor, widths_o: Tensor) -> Tensor:
    """Pack signed codes whose rows have widths of their own: a stream for each width, ascending, uint8 (n,).

    Args:
        codes: integers (out, ...), each in -2^(b-1) .. 2^(b-1) - 1 for the width b of its row.
        widths_o: integers (out,), 2 to 8.

    Raises ArtefactError as `pack` does.
    """
    kinds = sorted(set(widths_o.tolist()))
    return torch.cat([pack(codes[widths_o == bits], bits, -(2 ** (bits - 1))) for bits in kinds])


def unpack_rows(packed: Tensor, shape: Sequence[int], widths_o: Tensor) -> Tensor:
    """What `pack_rows` was given: int8 of this shape.

    Args:
        packed: uint8 (n,). Nothing is allocated before its length is found to fit.
        shape: (out, ...) of the codes.
        widths_o: integers (out,), 2 to 8.

    Raises ArtefactError for a length that does not fit.
    """
    columns = math.prod(shape[1:])
    counts = {bits: int((widths_o == bits).sum()) * columns for bits in sorted(set(widths_o.tolist()))}
    sizes = [packed_bytes(count, bits) for bits, count in counts.items()]
    if tuple(packed.shape) != (sum(sizes),):
        raise ArtefactError(
            f"codes of shape {tuple(shape)} and {min(counts)} to {max(counts)} bits are uint8 ({sum(sizes)},), not "
            f"{packed.dtype} {tuple(packed.shape)}"
        )
    codes = torch.empty((len(widths_o), columns), dtype=torch.int8)
    for (bits, count), stream in zip(counts.items(), torch.split(packed, sizes), strict=True):
        codes[widths_o == bits] = unpack(stream, count, bits, -(2 ** (bits - 1))).reshape(-1, columns)
    return codes.reshape(tuple(shape))


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise ArtefactError(f"codes of {bits} bits cannot be packed: widths are {WIDTHS.start} to {WIDTHS.stop - 1}")
