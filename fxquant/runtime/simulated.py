"""Simulated execution: nodes whose operands pass through quantizers, computed in float on the exact low-bit values.

Weights are held as integer codes (int8) with per-channel scales, the form the artefact packs; their float values are
derived when they are first read, and never saved. So a model that is loaded, reported, lowered or saved again holds a
byte for each weight; one that has run simulated holds five. "Simulated" means: right numbers, float speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxquant.errors import StateError
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.uniform_channels import UniformChannelsQuantizer


class QuantizedWeightModule(nn.Module):
    """Shared part of linear and convolution: weight codes, bias, input quantizer.

    Args:
        weight: the float weight that is quantized by `weight_quantizer`, or kept when that is None.
        bias: float (out,) or None.
        weight_quantizer: quantizer of the weight; None where it stays float.
        input_quantizer: None where the input stays float.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
    ) -> None:
        super().__init__()
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer
        self.bias: Tensor | None
        self.weight_codes: Tensor | None
        self.weight: Tensor
        self.weight_dtype = weight.dtype
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        codes = None if weight_quantizer is None else quantize_rows(weight, weight_quantizer)
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight", weight.detach().clone() if codes is None else None, persistent=codes is None)
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Forget the float weight, which is derived again when it is read; needed after codes or scales changed."""
        if self.weight_codes is not None:
            self._buffers["weight"] = None

    @property
    def has_weight(self) -> bool:
        """Whether the float weight is there, and need not be derived."""
        return self._buffers["weight"] is not None

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self._derived() if name == "weight" and found is None else found

    @torch.inference_mode(False)
    def _derived(self) -> Tensor:
        """The float weight of the codes, which is kept."""
        codes, quantizer = self.weight_codes, self.weight_quantizer
        assert codes is not None  # or the weight would be there
        assert quantizer is not None
        rows = quantizer.dequantize(codes.flatten(1).to(torch.int32))
        weight = rows.reshape(codes.shape).to(self.weight_dtype).detach()
        if type(weight) is Tensor:  # not what a run without numbers makes
            self._buffers["weight"] = weight
        return weight

    @property
    def weight_like(self) -> Tensor:
        """Zeros of the weight's shape and dtype, which take no memory: to ask for these without deriving the weight."""
        kept = self.weight if self.weight_codes is None else self.weight_codes
        return torch.zeros((), dtype=self.weight_dtype).expand(kept.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        if dtype != self.weight_dtype:
            self.weight  # noqa: B018 - what is cast is the weight, not the scales that make it
            self.weight_dtype = dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def check_codes(self, state: Mapping[str, Any], path: str) -> None:
        """Raise StateError where a state has codes of this layer that its weight quantizer does not have.

        Args:
            state: a state dict, about to be loaded.
            path: what the layer's names in it begin with, without the dot.
        """
        name = f"{path}.".lstrip(".")
        codes, quantizer = state.get(f"{name}weight_codes"), self.weight_quantizer
        if isinstance(quantizer, UniformChannelsQuantizer):
            try:
                quantizer.check_state(state, f"{name}weight_quantizer.", codes)
            except ValueError as error:
                raise StateError(f"'{path}': {error}") from error
            return
        bounds = getattr(quantizer, "code_range", None)
        if codes is None or bounds is None:
            return
        if codes.numel() and not bounds[0] <= int(codes.min()) <= int(codes.max()) <= bounds[1]:
            raise StateError(f"codes of '{path}' are not all within {bounds}: they are of another width")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        self.check_codes(state_dict, prefix.rstrip("."))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def requantize(self, weight: Tensor) -> None:
        """Take another float weight of the same shape, quantized by the quantizer that is there."""
        if self.weight_quantizer is not None:
            self.weight_codes = quantize_rows(weight, self.weight_quantizer)
            self.refresh()

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input as the multiplication sees it."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def operand_bits(self) -> tuple[int | None, tuple[int | None, ...]]:
        """Width of the weight, and of the input; None where it stays float."""
        return bits_of(self.weight_quantizer), (bits_of(self.input_quantizer),)

    def in_float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer computes of a float input with a float weight: no quantizer has any say in it.

        Args:
            x: float input of the layer.
            weight: float weight, of the shape of the layer's own.
            bias: float (out,), or None.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Shape of the weight."""
        return f"weight {tuple(self.weight_like.shape)}"


def _refresh(module: QuantizedWeightModule, incompatible_keys: object) -> None:
    """After codes and scales were loaded: the float weight follows them."""
    module.refresh()


def bits_of(quantizer: Quantizer | None) -> int | None:
    """The quantizer's width; None without one."""
    return None if quantizer is None else quantizer.bits


def quantize_rows(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """Codes of a weight (out, ...) under a quantizer whose scale is per output channel: int8, shape of the weight."""
    return quantizer.quantize(weight.detach().flatten(1)).to(torch.int8).reshape(weight.shape)


class QuantizedLinear(QuantizedWeightModule):
    """y = Q(x) Q(W)^T + b."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return self.in_float(self.quantized_input(x), self.weight, self.bias)

    def in_float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y = x W^T + b.

        Args:
            x: float (..., in).
            weight: float (out, in).
            bias: float (out,), or None.
        """
        return functional.linear(x, weight, bias)

    def settings(self) -> dict[str, Any]:
        """Nothing beyond the tensors."""
        return {}


class QuantizedConv2d(QuantizedWeightModule):
    """Convolution of Q(x) with Q(W).

    Args:
        weight: float (out, in / groups, height, width).
        bias: float (out,), or None.
        weight_quantizer: quantizer of the weight; None where it stays float.
        input_quantizer: quantizer of the input; None where it stays float.
        geometry: stride, padding, dilation, groups of the original.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_quantizer: Quantizer | None,
        input_quantizer: Quantizer | None,
        geometry: dict[str, Any],
    ) -> None:
        self.geometry = geometry
        super().__init__(weight, bias, weight_quantizer, input_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in, H, W) to (B, out, H', W')."""
        return self.in_float(self.quantized_input(x), self.weight, self.bias)

    def in_float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x with W, plus b.

        Args:
            x: float (B, in, H, W).
            weight: float (out, in / groups, height, width).
            bias: float (out,), or None.
        """
        return functional.conv2d(x, weight, bias, **self.geometry)

    def settings(self) -> dict[str, Any]:
        """The geometry."""
        return dict(self.geometry)


class QuantizedMatmul(nn.Module):
    """Product of two quantized activations."""

    def __init__(self, left_quantizer: Quantizer | None, right_quantizer: Quantizer | None) -> None:
        super().__init__()
        self.left_quantizer, self.right_quantizer = left_quantizer, right_quantizer

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """left (..., n, d) times right (..., d, m)."""
        left = left if self.left_quantizer is None else self.left_quantizer(left)
        right = right if self.right_quantizer is None else self.right_quantizer(right)
        return self.in_float(left, right)

    def operand_bits(self) -> tuple[int | None, tuple[int | None, ...]]:
        """None, there is no weight; and widths of the left and the right input."""
        return None, (bits_of(self.left_quantizer), bits_of(self.right_quantizer))

    def in_float(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of what it is given."""
        return torch.matmul(left, right)


class QuantizedInput(nn.Module):
    """A module (Softmax, LayerNorm) computed on its quantized input."""

    def __init__(self, inner: nn.Module, input_quantizer: Quantizer) -> None:
        super().__init__()
        self.inner, self.input_quantizer = inner, input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """inner(Q(x))."""
        result: Tensor = self.inner(self.input_quantizer(x))
        return result

    def operand_bits(self) -> tuple[int | None, tuple[int | None, ...]]:
        """None, no weight is quantized; and the width of the input."""
        return None, (self.input_quantizer.bits,)
