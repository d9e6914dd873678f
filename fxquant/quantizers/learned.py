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
_LEANING = 0.4  # of a step, at most: where rounding starts from a given code
_BEYOND = 2.0**26  # scales: further out than the levels of any quantizer reach


def scale_of(quantizer: Quantizer) -> Tensor | None:
    """The scale that may be learned; None for a family that does not follow its scale homogeneously."""
    return quantizer.scale if isinstance(quantizer, HOMOGENEOUS) else None


class LearnedScale(nn.Module):
    """A quantizer with a learned scale and dropped quantization.

    Args:
        quantizer: the quantizer whose scale learning starts from.
        drop: probability, 0 to 1, that an element stays float.
        generator: of these draws, on the CPU, so that they are the same wherever the input is.

    Learns `log_factor`, float32 (), the parameter t; scales are multiplied by exp(t). Its gradient is multiplied by
    `counts`, a number that may be set before every forward; with 0 there is none, which is cheaper.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        drop: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.counts = 1.0
        self.start, self.current, self.drop, self.generator = quantizer, copy.deepcopy(quantizer), drop, generator
        scale = scale_of(quantizer)
        self.learns = scale is not None
        self.offset = quantizer.offset if isinstance(quantizer, LevelTableQuantizer) else 0.0
        where = None if scale is None else scale.device
        self.log_factor = nn.Parameter(torch.zeros((), device=where), requires_grad=self.learns)
        edge = None if scale is None else scale.detach() * _BEYOND
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", torch.zeros(()) if edge is None else quantizer(-edge), persistent=False)
        self.register_buffer("high", torch.zeros(()) if edge is None else quantizer(edge), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x float to the same shape, quantized; while training, some elements stay as they are."""
        self._follow()
        kept = None
        if self.training and self.drop:
            kept = torch.rand(x.shape, generator=self.generator).to(x.device) < self.drop
        if not torch.is_grad_enabled() and kept is None:
            return self.current(x)  # type: ignore[no-any-return]
        quantized: Tensor = _StraightThrough.apply(x, self.log_factor, self, kept)
        return quantized

    def finish(self) -> Quantizer:
        """The quantizer that was learned, as a new module."""
        self._follow()
        return copy.deepcopy(self.current)

    def _follow(self) -> None:
        scale, current = scale_of(self.start), scale_of(self.current)
        if scale is not None and current is not None:
            with torch.no_grad():
                current.copy_(as_scale(scale * self.log_factor.exp()))

    def inside(self, values: Tensor, x: Tensor) -> Tensor:
        """values where x lies between the outermost levels, else 0; both count from the offset."""
        factor = self.log_factor.detach().exp()
        low, high = (self.low + self.offset) * factor, (self.high + self.offset) * factor
        if low.ndim:
            return values * ((x >= low) & (x <= high))
        # What hardtanh's derivative does, in one pass.
        return torch.ops.aten.hardtanh_backward(values, x, float(low), float(high))  # type: ignore[no-any-return]


class _StraightThrough(torch.autograd.Function):
    """Q at its learned scale, or x where it is kept; with P = 1 inside the range or where kept, else 0,
    d/dx = P and d/dt = result - P x; both x and result count from the offset."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_factor: Tensor, owner: LearnedScale, kept: Tensor | None) -> Tensor:
        result = _by_images(owner.current, x)
        counted = x + owner.offset if owner.offset else x
        slope = None
        if owner.learns and owner.counts:
            slope = result + owner.offset if owner.offset else result
            slope = slope - owner.inside(counted, counted)
            slope = slope if kept is None else slope.masked_fill_(kept, 0)
        if kept is not None:
            result = torch.where(kept, x, result)
        ctx.owner, ctx.counts = owner, owner.counts
        ctx.save_for_backward(counted, slope, kept)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        counted, slope, kept = ctx.saved_tensors
        if not ctx.owner.learns:
            return gradient, None, None, None
        to_x = ctx.owner.inside(gradient.to(counted.dtype), counted)
        if kept is not None:
            to_x = torch.where(kept, gradient, to_x)
        if slope is None:
            return to_x, None, None, None
        # In float32: torch's product of vectors in bfloat16 is not vectorised.
        to_factor = torch.dot(gradient.reshape(-1).float(), slope.reshape(-1).float()) * ctx.counts
        return to_x, to_factor, None, None


def _by_images(quantizer: Quantizer, x: Tensor) -> Tensor:
    """quantizer(x), image by image, which stay in the cache; in the type that autocast has products in."""
    kind = x.device.type
    if kind != "cpu":
        return quantizer(x)  # type: ignore[no-any-return]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    result = torch.empty_like(x, dtype=dtype)
    for to, part in zip(torch.split(result, 1), torch.split(x, 1), strict=True):
        to.copy_(quantizer(part))
    return result


class LearnedCodes(nn.Module):
    """A weight whose codes and scales learn: W^ = s exp(t) round(clamp(u)), the derivative of rounding taken as 1.

    Args:
        weight: the weight whose codes are learned, float (out, ...).
        quantizer: uniform, its scale () or (out, 1).
        codes: integer (out, ...), where learning starts, each leaning towards the weight as far as it stays the same
            code; None: the nearest to the weight.

    Learns `units`, u, float (out, columns), in steps of the grid, so that a rate of learning means the same at every
    width; and `log_factor`, t, of the scale's shape.
    """

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer, codes: Tensor | None = None) -> None:
        super().__init__()
        self.start, self.shape = quantizer, weight.shape
        units = _in_steps(weight, quantizer)
        if codes is not None:
            start = codes.flatten(1).to(units.dtype)
            units = units.clamp(start - _LEANING, start + _LEANING)
        self.units = nn.Parameter(units)
        self.log_factor = nn.Parameter(torch.zeros_like(quantizer.scale))

    def forward(self) -> Tensor:
        """The weight on its grid, float, shape of the weight."""
        units = self.units.clamp(*self.start.ends)
        codes = units + (units.detach().round() - units.detach())
        return ((codes - _zero(self.start)) * self._scale()).reshape(self.shape)

    def finish(self) -> UniformQuantizer:
        """The quantizer that was learned, as a new module; it leaves the learned weight as it is."""
        return self.start.rescaled(self._scale().detach())

    def _scale(self) -> Tensor:
        return self.start.scale * self.log_factor.exp()


class SoftRounding(nn.Module):
    """A weight between the two grid points around each of its entries (AdaRound).

    Args:
        weight: the weight whose codes are learned, float (out, ...).
        quantizer: uniform, its scale () or (out, 1).
        codes: integer (out, ...), where hard rounding starts: the other point is the neighbour towards the weight.
            None: the two points around the weight, and the soft weight equals it wherever it lies within the grid.

    Learns `logits`, the parameter a, of the shape of the flattened weight.
    """

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer, codes: Tensor | None = None) -> None:
        super().__init__()
        units = _in_steps(weight, quantizer)
        self.shape, self.ends = weight.shape, quantizer.ends
        self.scale, self.zero = quantizer.scale.detach(), _zero(quantizer)
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
        codes = (self.floor + share).clamp(*self.ends)
        return ((codes - self.zero) * self.scale).reshape(self.shape)


def _in_steps(weight: Tensor, quantizer: UniformQuantizer) -> Tensor:
    """The weight (out, ...) in steps of its grid, counted as codes are: float32 (out, columns)."""
    return weight.detach().flatten(1).float() / quantizer.scale + _zero(quantizer)


def _zero(quantizer: UniformQuantizer) -> Tensor | int:
    return 0 if quantizer.zero_point is None else quantizer.zero_point
