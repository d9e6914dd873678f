"""Symmetric uniform quantization of a weight whose output channels have widths of their own.

A weight of b bits has channels of b - 1, b and b + 1 bits, as many wider as narrower ones, so that their mean is b: the
weight takes the same memory in files, and the layer as many bit operations, as with b bits for each. The loss cares for
some channels far more than for others, and these are the wider ones (`fxquant.quantizers.search`). In memory kernels
keep all channels of a layer at the width of the widest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxquant.checks.untrusted import Rule, whole
from fxquant.quantizers.uniform import UniformQuantizer

NARROWEST, WIDEST = 2, 8
"""Widths that a channel may have, in bits."""


class UniformChannelsQuantizer(UniformQuantizer):
    """Symmetric, with a scale and a width for each row of a weight.

    Args:
        bits: the width of the whole weight, the mean of its channels' widths.
        scale: float32 (out, 1).
        widths: int8 (out, 1), the bits of each channel.

    Raises:
        ValueError: widths are not one for each scale, lie outside `NARROWEST` to `WIDEST`, or have another mean.
    """

    kind = "uniform-channels"
    rules: ClassVar[Mapping[str, Rule] | None] = {"channels": whole(1, 2**24)}
    widths: Tensor

    def __init__(self, bits: int, scale: Tensor, widths: Tensor) -> None:
        super().__init__(bits, scale)
        self.register_buffer("widths", widths.to(torch.int8))
        self.check_numbers()

    def check_numbers(self) -> None:
        """Raise ValueError for widths that no such weight has."""
        shape = tuple(self.scale.shape)
        if self.widths.shape != shape or shape != (len(self.scale), 1):
            raise ValueError(f"widths {tuple(self.widths.shape)} and scales {shape} are not one for each channel")
        if self.widths.is_meta:
            return
        least, most, total = int(self.widths.min()), int(self.widths.max()), int(self.widths.sum())
        if not NARROWEST <= least <= most <= WIDEST or total != self.bits * len(self.widths):
            raise ValueError(
                f"channels have {NARROWEST} to {WIDEST} bits and a mean of {self.bits}; found {least} to {most}, mean "
                f"{total / len(self.widths):.4g}"
            )

    def check_state(self, state: Mapping[str, Any], prefix: str, codes: Tensor | None) -> None:
        """Raise ValueError for widths of a state dict that no such weight has, and codes that are not within them.

        Args:
            state: a state dict, about to be loaded.
            prefix: of this quantizer's names in it.
            codes: the weight's, integer (out, ...); None: there are none.
        """
        given = [state.get(f"{prefix}{name}", getattr(self, name)) for name in ("scale", "widths")]
        if not all(isinstance(new, Tensor) and new.shape == self.scale.shape for new in given):
            return  # torch says so itself
        low, high = UniformChannelsQuantizer(self.bits, *given).ends
        if codes is not None and codes.shape[:1] == low.shape[:1]:
            rows = codes.flatten(1)
            if bool(((rows < low) | (rows > high)).any()):
                raise ValueError("codes are not all within the widths of their channels")

    @property
    def widest_bits(self) -> int:
        """The width of the widest channel."""
        return int(self.widths.max())

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest code of every channel, float32 of the scale's shape."""
        half = torch.exp2(self.widths.float() - 1)
        return -half, half - 1

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of x, float (out, columns): int32."""
        return torch.round(x.float() * (1 / self.scale)).clamp(*self.ends).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """Values of x, float (out, columns), in its dtype."""
        return (x.float() * (1 / self.scale)).round_().clamp_(*self.ends).mul_(self.scale).to(x.dtype)

    def rescaled(self, scale: Tensor) -> UniformChannelsQuantizer:
        """The same widths at other scales, float32 (out, 1)."""
        return UniformChannelsQuantizer(self.bits, scale, self.widths)

    def settings(self) -> dict[str, Any]:
        """Kind, bits and the number of channels."""
        return {"kind": self.kind, "bits": self.bits, "channels": len(self.widths)}

    @classmethod
    def empty(cls, **arguments: Any) -> UniformChannelsQuantizer:
        """From bits and channels."""
        channels, bits = int(arguments["channels"]), int(arguments["bits"])
        return cls(bits, torch.ones(channels, 1), torch.full((channels, 1), bits))


def mixed_widths(cost_wo: Tensor, narrower: int) -> Tensor:
    """The widths of least summed cost of channels that have `narrower`, one and two bits more, int8 (out,).

    As many channels get the widest as get the narrowest width, so that the mean is the middle one.

    Args:
        cost_wo: float (3, out), what each channel costs at the three widths, ascending.
        narrower: the least of the three, in bits.
    """
    cost = cost_wo.double()
    gain = cost[1] - cost[2]
    # Narrowing a channel costs at least what widening it gains, where costs are convex; so no channel is to do both.
    price = torch.maximum(cost[0] - cost[1], gain)
    gains, widened = gain.sort(descending=True, stable=True)
    prices, narrowed = price.sort(stable=True)
    pays = int((gains > prices).sum())
    widths = torch.full(gain.shape, narrower + 1, dtype=torch.int8, device=cost.device)
    widths[widened[:pays]] += 1
    widths[narrowed[:pays]] -= 1
    return widths
