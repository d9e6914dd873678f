"""What a quantizer is: codes in, codes out, and the JSON from which it can be rebuilt without executing code.

A quantizer is a small `nn.Module` that is not changed after it is built: its numbers are buffers, so it moves with
`.to`, is saved with the state dict and copied with the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxquant.checks.untrusted import Rule
from fxquant.errors import ArtefactError


class Quantizer(nn.Module):
    """Base of all quantizers: `quantize` to integer codes, `dequantize` back, `forward` does both (simulation).

    kind: the name of the class in files. rules: what a file may say for each of its `settings` besides kind and bits;
    None: no file holds such a quantizer.
    """

    kind: ClassVar[str]
    rules: ClassVar[Mapping[str, Rule] | None] = None
    _kinds: ClassVar[dict[str, type[Quantizer]]] = {}

    def __init__(self, bits: int) -> None:
        super().__init__()
        if not 1 <= bits <= 16:
            raise ValueError(f"a quantizer has 1 to 16 bits, not {bits}")
        self.bits = bits

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Quantizer._kinds[cls.kind] = cls

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of x, int32, same shape; every code fits in `widest_bits` bits, signed or unsigned."""
        raise NotImplementedError(f"{type(self).__name__} has no quantize")

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of int32 codes, float32, same shape."""
        raise NotImplementedError(f"{type(self).__name__} has no dequantize")

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize: the values that low-bit execution would compute with; dtype of x."""
        return self.dequantize(self.quantize(x)).to(x.dtype)

    @property
    def widest_bits(self) -> int:
        """The width that holds every code: `bits`, but where channels have widths of their own."""
        return self.bits

    def check_numbers(self) -> None:
        """Raise ValueError for tensors that no such quantizer has; whoever has loaded some calls this."""

    def settings(self) -> dict[str, Any]:
        """JSON values that, with the state dict, rebuild this quantizer: `kind` and constructor arguments."""
        return {"kind": self.kind, "bits": self.bits}

    def extra_repr(self) -> str:
        """Kind and bits."""
        return f"{self.kind}, bits={self.bits}"

    @classmethod
    def rules_of(cls, kind: str) -> Mapping[str, Rule]:
        """What a file may say for each setting of a kind. Raises ArtefactError for a kind that no file holds."""
        found = Quantizer._kinds[kind].rules if kind in Quantizer._kinds else None
        if found is None:
            known = sorted(name for name, quantizer in Quantizer._kinds.items() if quantizer.rules is not None)
            raise ArtefactError(f"there is no quantizer of kind {kind!r:.100} in files; there are {', '.join(known)}")
        return found

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Quantizer:
        """Build an empty quantizer of a known kind from `settings()`; numbers arrive with the state dict.

        Raises ArtefactError for an unknown kind or settings that do not fit it.
        """
        arguments = dict(settings)
        kind = arguments.pop("kind", None)
        if kind not in Quantizer._kinds:
            raise ArtefactError(f"unknown quantizer kind {kind!r}: this version knows {sorted(Quantizer._kinds)}")
        try:
            return Quantizer._kinds[kind].empty(**arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"settings of quantizer kind {kind!r} do not fit: {settings}: {error}") from error

    @classmethod
    def empty(cls, **arguments: Any) -> Quantizer:
        """A quantizer with placeholder numbers, ready for `load_state_dict`."""
        raise NotImplementedError(f"{cls.__name__} has no empty")


def as_scale(value: Tensor | float) -> Tensor:
    """A scale as a float32 tensor that is never zero, so that division is safe."""
    scale = torch.as_tensor(value, dtype=torch.float32)
    # Without numbers there is nothing to clamp, and torch would load its compiler for it: a second when a file is read.
    return scale if scale.is_meta else scale.clamp_min(torch.finfo(torch.float32).tiny * 1e6)
