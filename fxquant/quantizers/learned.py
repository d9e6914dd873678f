"""Quantizers while they are being learned: soft rounding of weights, scales with gradients, dropped quantization.

- AdaRound (Nagel et al., eq. 22-24): W^ = s clamp(floor(W / s) + h(a)), h(a) = clamp(1.2 sigmoid(a) - 0.1, 0, 1), and
  a loss sum(1 - |2h - 1|^beta) that drives every h to 0 or 1.
- Learned step size (Esser et al., LSQ): x^ = c Q(x / c) with the derivative of rounding taken as 1 inside the range of
  Q and 0 outside. Uniform, shifted regions, log2 and level tables are homogeneous in their scale (a table with an
  offset is, once x counts from it), so Q at scale c s is c Q(x / c): one number c per quantizer moves all its levels,
  whatever the family. c = exp(t), so that a step of t is relative.
- QDrop (Wei et al., eq. 9): each element stays float with probability p.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.quantizers.level_table import LevelTableQuantizer
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.quantizer import Quantizer, as_scale
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer
from fxquant.quantizers.uniform import UniformQuantizer

HOMOGENEOUS = (UniformQuantizer, ShiftedRegionsQuantizer, Log2Quantizer, LevelTableQuantizer)
_NEAREST = 0.6  # at least this share of a step towards the grid point where rounding starts
_BEYOND = 2.0**26  # scales: further out than the levels of any quantizer reach


def scale_of(quantizer: Quantizer) -> Tensor | None:
    """The scale that may be learned; None for a family that does not follow its scale homogeneously."""
    return quantizer.scale if isinstance(quantizer, HOMOGENEOUS) else None


class LearnedScale(nn.Module):
    """An activation quantizer with a learned scale and dropped quantization.

    quantizer: where learning starts. drop: probability, 0 to 1, that an element stays float. generator: of these draws,
    on the device of the input. `log_factor`: float32 (), the parameter t; scales are multiplied by exp(t).
    """

    def __init__(self, quantizer: Quantizer, drop: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.start, self.drop, self.generator = quantizer, drop, generator
        self.low: Tensor
        self.high: Tensor
        scale = scale_of(quantizer)
        self.learns = scale is not None
        self.offset = quantizer.offset if isinstance(quantizer, LevelTableQuantizer) else 0.0
        where = None if scale is None else scale.device
        self.log_factor = nn.Parameter(torch.zeros((), device=where), requires_grad=self.learns)
        edge = torch.zeros(()) if scale is None else scale.detach() * _BEYOND
        self.register_buffer("low", quantizer(-edge), persistent=False)
        self.register_buffer("high", quantizer(edge), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x float to the same shape, quantized; while training, some elements stay as they are."""
        kept = None
        if self.training and self.drop:
            kept = torch.rand(x.shape, generator=self.generator, device=x.device) < self.drop
        quantized: Tensor = _StraightThrough.apply(x, self.log_factor, self, kept)
        return quantized

    def finish(self) -> Quantizer:
        """The quantizer that was learned, as a new module."""
        found = copy.deepcopy(self.start)
        scale = scale_of(found)
        if scale is not None:
            with torch.no_grad():
                scale.copy_(as_scale(scale * self.log_factor.detach().exp()))
        return found


class _StraightThrough(torch.autograd.Function):
    """c Q(x / c), c = exp(t), or x where it is kept; with P = 1 inside the range or where kept, else 0,
    d/dx = P and d/dt = result - P x: one mask for all of it; both x and result count from the offset."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_factor: Tensor, owner: LearnedScale, kept: Tensor | None) -> Tensor:
        factor, offset = log_factor.exp(), owner.offset
        units = (x + offset) / factor - offset if offset else x / factor
        result: Tensor = (owner.start(units) + offset) * factor - offset if offset else owner.start(units) * factor
        passes = torch.ones_like(x, dtype=torch.bool)
        if owner.learns:
            passes = (units >= owner.low) & (units <= owner.high)
        if kept is not None:
            passes |= kept
            result = torch.where(kept, x, result)
        ctx.offset = offset
        ctx.save_for_backward(x, result, passes)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, result, passes = ctx.saved_tensors
        to_x = gradient * passes
        to_factor = (gradient * (result + ctx.offset) - to_x * (x + ctx.offset)).sum()
        return to_x, to_factor, None, None


class SoftRounding(nn.Module):
    """A weight between the two grid points around each of its entries (AdaRound).

    weight: float (out, ...). quantizer: symmetric uniform, its scale () or (out, 1). codes: integer (out, ...), where
    hard rounding starts: the other point is the neighbour towards the weight. None: the two points around the weight,
    and the soft weight equals it wherever it lies within the grid. `logits`: the parameter a, shape of the flattened
    weight.
    """

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer, codes: Tensor | None = None) -> None:
        super().__init__()
        units = weight.detach().flatten(1).float() / quantizer.scale
        self.shape, self.code_range = weight.shape, quantizer.code_range
        self.scale = quantizer.scale.detach()
        self.floor = torch.floor(units)
        if codes is None:
            share = (units - self.floor).clamp(0, 1)
        else:
            start = codes.flatten(1).to(units.dtype)
            self.floor = torch.where(units < start, start - 1, start)
            up = start > self.floor
            share = torch.where(
                up, (units - self.floor).clamp(_NEAREST, 1), (units - self.floor).clamp(0, 1 - _NEAREST)
            )
        self.logits = nn.Parameter(-torch.log(1.2 / (share + 0.1) - 1))

    def share(self) -> Tensor:
        """h, float in 0 to 1: how far up each entry is rounded."""
        return (1.2 * torch.sigmoid(self.logits) - 0.1).clamp(0, 1)

    def forward(self) -> Tensor:
        """The soft weight, float, shape of the weight."""
        return self._weight(self.share())

    def hard(self) -> Tensor:
        """The weight on its grid, float, shape of the weight."""
        with torch.no_grad():
            return self._weight((self.share() >= 0.5).to(self.floor.dtype))

    def penalty(self, beta: float) -> Tensor:
        """sum(1 - |2h - 1|^beta), float (): 0 when every h is 0 or 1."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    def _weight(self, share: Tensor) -> Tensor:
        return ((self.floor + share).clamp(*self.code_range) * self.scale).reshape(self.shape)
