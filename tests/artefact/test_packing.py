"""Packing is exact at every width and length, and takes no byte more than the bits need."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.artefact.packing import pack, packed_bytes, unpack
from fxquant.errors import ArtefactError

pytestmark = pytest.mark.quick


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_unpack_inverts_pack(bits, signed, count, seed):
    lowest = -(2 ** (bits - 1)) if signed else 0
    drawn = np.random.default_rng(seed).integers(lowest, lowest + 2**bits, count)
    codes = torch.from_numpy(drawn).to(torch.int16)
    packed = pack(codes, bits, lowest)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, count, bits, lowest).to(torch.int16), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_stream_is_the_codes_bits_in_order(bits):
    codes = torch.from_numpy(np.random.default_rng(bits).integers(0, 2**bits, 13))
    stream = np.unpackbits(pack(codes, bits, 0).numpy(), bitorder="little")
    expected = [int(code) >> k & 1 for code in codes for k in range(bits)]
    assert stream[: len(expected)].tolist() == expected
    assert not stream[len(expected) :].any()


def test_signed_codes_come_back_as_int8():
    codes = torch.tensor([[-128, 127], [0, -1]], dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, 8, -128), 4, 8, -128), codes.flatten())


@pytest.mark.parametrize(("code", "bits", "lowest"), [(8, 4, -8), (-9, 4, -8), (-1, 3, 0), (300, 8, 0)])
def test_codes_that_do_not_fit_are_refused(code, bits, lowest):
    with pytest.raises(ArtefactError, match=f"do not fit {bits} bits"):
        pack(torch.tensor([0, code]), bits, lowest)


@pytest.mark.parametrize("bits", [0, 1, 9, -3])
def test_widths_outside_2_to_8_are_refused(bits):
    with pytest.raises(ArtefactError, match="widths are 2 to 8"):
        pack(torch.zeros(3, dtype=torch.int8), bits, 0)
    with pytest.raises(ArtefactError, match="widths are 2 to 8"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, bits, 0)


@pytest.mark.parametrize("count", [-1, 0, 3, 6, 2**60])
def test_lengths_that_do_not_fit_are_refused_without_allocating(count):
    with pytest.raises(ArtefactError, match=f"{count} codes of 4 bits"):
        unpack(torch.zeros(1, dtype=torch.uint8), count, 4, -8)


def test_packed_must_be_flat_bytes():
    for packed in (torch.zeros(2, dtype=torch.int8), torch.zeros(1, 2, dtype=torch.uint8)):
        with pytest.raises(ArtefactError, match="uint8"):
            unpack(packed, 4, 4, -8)


def test_millions_of_codes_are_unpacked():
    codes = torch.randint(-8, 8, (5_500_000,), dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, 4, -8), len(codes), 4, -8), codes)
