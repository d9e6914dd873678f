"""The codes of a weight as a file keeps them: each at the width that its quantizer gives it."""

from __future__ import annotations

from torch import Tensor

from fxquant.artefact.packing import pack, pack_rows, unpack, unpack_rows
from fxquant.checks.untrusted import element_count
from fxquant.errors import ArtefactError
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.quantizers.uniform_channels import UniformChannelsQuantizer


def packed_codes(codes: Tensor, quantizer: UniformQuantizer) -> Tensor:
    """uint8 (n,) of codes, integers (out, ...). Raises ArtefactError for codes that the quantizer does not have."""
    if isinstance(quantizer, UniformChannelsQuantizer):
        return pack_rows(codes, quantizer.widths[:, 0])
    return pack(codes, quantizer.bits, quantizer.code_range[0])


def unpacked_codes(packed: Tensor, shape: tuple[int, ...], quantizer: UniformQuantizer) -> Tensor:
    """What `packed_codes` was given: integers of this shape. Raises ArtefactError for what does not fit together.

    Args:
        packed: uint8 (n,). Nothing is allocated before its length is found to fit.
        shape: (out, ...) of the weight.
        quantizer: whose codes these are.
    """
    if not isinstance(quantizer, UniformChannelsQuantizer):
        return unpack(packed, element_count(shape), quantizer.bits, quantizer.code_range[0])
    if len(quantizer.widths) != shape[0]:
        raise ArtefactError(f"widths of {len(quantizer.widths)} channels do not fit a weight of shape {shape}")
    return unpack_rows(packed, shape, quantizer.widths[:, 0])
