"""Logarithmic quantization of post-Softmax values within their row: x^ = n_k / sum of the row's n.

k = round(-log2(x / max) / base), max the largest value of the row, n_k = round(255 * 2^(-base k)), a byte; the last
code is zero. What sets it apart from log2 with one scale for a tensor: a row's levels begin at its own largest value,
whatever the attention looks like; rows sum to one again, so no error is common to all keys; and the base spreads the
codes over the eight powers of two that a byte can tell apart, so 2 bits do.

In integers: since x / max = 2^(s - largest s) for scores s (in powers of two), k is a uniform code of the score below
the row's largest. Neither an exponential nor the softmax's sum is needed; the product with V is divided by the sum of
n, a whole number. FQ-ViT's log-int-softmax and AdaLog (a searched base) have neither the row's scale nor its sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fxquant.checks.untrusted import Rule
from fxquant.quantizers.family import Family, Proposals, Statistics
from fxquant.quantizers.quantizer import Quantizer, as_scale

LARGEST = 255
POWERS = 9.2  # of two, below the largest: levels beyond 9 are nearer to zero than to one 255th


class RowLogQuantizer(Quantizer):
    """Powers of 2^-base below the largest value of each row (last dimension), and zero; rows sum to one.

    base: float32 scalar, in powers of two per code. For non-negative values whose rows sum to one.
    """

    kind = "row-log"
    rules: ClassVar[Mapping[str, Rule] | None] = {}

    def __init__(self, bits: int, base: Tensor | float) -> None:
        super().__init__(bits)
        self.base: Tensor
        self.register_buffer("base", as_scale(base))

    def quantize(self, x: Tensor) -> Tensor:
        """Codes k, int32 in 0 .. 2^bits-1, the last one meaning zero."""
        x, zero = x.float(), 2**self.bits - 1
        # In place, here and below: fresh memory costs more than arithmetic. Runtimes differ in what they make of the
        # logarithm of a negative number, and agree on that of zero.
        ratio = (x / x.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)).clamp_min_(0)
        return ratio.log2_().mul_(-1 / self.base).round_().clamp_(0, zero).nan_to_num_(zero).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of codes, float32; codes of whole rows."""
        # The same as levels[codes], several times faster.
        found = self.levels().index_select(0, codes.flatten()).reshape(codes.shape)
        return found.div_(found.sum(-1, keepdim=True).clamp_min_(1))

    def levels(self) -> Tensor:
        """n_k by code, float32 (2^bits,), whole numbers from 255 down to 0."""
        steps = torch.arange(2**self.bits, dtype=torch.float64, device=self.base.device)
        levels = torch.round(LARGEST * torch.exp2(-self.base.double() * steps))
        levels[-1] = 0
        return levels.float()

    @classmethod
    def empty(cls, **arguments: Any) -> RowLogQuantizer:
        """From bits."""
        return cls(int(arguments["bits"]), 1.0)


def row_log(statistics: Statistics, bits: int) -> Proposals:
    """Powers of one base below the largest of each row, and zero, in whole 255ths; see `RowLogQuantizer`.

    The base follows from the widths, it is not searched: what the zero swallows has to weigh little with all keys of a
    row together, as little as what rounding costs at this width. So it begins log2(keys) powers of two below the
    largest and, since each bit halves what rounding costs, one power further for each bit from 4 on, as far as a byte
    reaches. A search by the predicted loss, which takes errors of a row for independent, stops one to two powers too
    early.
    """
    last = 2**bits - 1
    reach = min(math.log2(max(statistics.row_length, 2)) + max(bits / 2 - 1, bits - 3), POWERS)
    base = max(reach, 1.0) / (last - 0.5)
    exponents = base * np.arange(last - 1, -1, -1)
    levels = np.concatenate([[0.0], np.rint(LARGEST * np.exp2(-exponents)) / LARGEST])
    thresholds = np.exp2(-exponents - base / 2)
    return Proposals(levels[None], thresholds[None], lambda _: RowLogQuantizer(bits, base))


FAMILIES = (Family("row-log", row_log, byte_bits=8, of_rows=True),)
