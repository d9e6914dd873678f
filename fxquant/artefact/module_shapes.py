"""What a module that a file may hold gives for a tensor: its shape and dtype, by rule, without computing.

A module's result is zeros in the place of the values. Each rule refuses what the module itself would refuse.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.artefact.matrix_products import Reserve, linear, product
from fxquant.artefact.operation_sizes import predicted_elements
from fxquant.errors import ArtefactError
from fxquant.quantizers.observers import Observer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedInput, QuantizedLinear, QuantizedMatmul

_SAME = (
    nn.SiLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Mish, nn.LeakyReLU, nn.ELU,
    nn.Softplus, nn.Hardtanh, nn.GELU, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM_CHANNELS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.GroupNorm: (2, 3, 4, 5),
}  # dimensions of the input
# What may give more than it takes, and the operation that is sized in its place.
_RESIZING: dict[type[nn.Module], str] = {
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
}


def module_result(module: nn.Module, args: tuple[Any, ...], reserve: Reserve) -> Tensor:
    """Zeros of the shape and dtype of module(*args).

    Args:
        module: a module of a graph from a file.
        args: what it is called with.
        reserve: is told how many elements a result has before it is made, and may refuse.

    Raises ArtefactError, or whatever torch raises, where the module does not take them.
    """
    wanted = 2 if isinstance(module, QuantizedMatmul) else 1
    if len(args) != wanted or not all(isinstance(arg, Tensor) for arg in args):
        raise ArtefactError(f"a {type(module).__name__} takes {wanted} tensor{'s' * (wanted > 1)}")
    x: Tensor = args[0]
    if isinstance(module, QuantizedLinear):
        _check_quantizer(module.input_quantizer, x)
        return linear(x, module.weight_like, module.bias, reserve)
    if isinstance(module, QuantizedConv2d):
        _check_quantizer(module.input_quantizer, x)
        return _convolved(x, module.weight_like, module.bias, module.geometry, reserve)
    if isinstance(module, QuantizedMatmul):
        _check_quantizer(module.left_quantizer, x)
        _check_quantizer(module.right_quantizer, args[1])
        return product(x, args[1], reserve)
    if isinstance(module, QuantizedInput):
        _check_quantizer(module.input_quantizer, x)
        return module_result(module.inner, args, reserve)
    return x if isinstance(module, Observer | nn.Identity) else _plain_result(module, x, reserve)


def _plain_result(module: nn.Module, x: Tensor, reserve: Reserve) -> Tensor:
    kind: Any = type(module)
    if isinstance(module, nn.Linear):
        return linear(x, module.weight, module.bias, reserve)
    if isinstance(module, _CONVOLUTIONS):
        geometry = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups")}
        return _convolved(x, module.weight, module.bias, geometry, reserve, module.padding_mode)
    if not x.is_floating_point():
        raise ArtefactError(f"a {kind.__name__} takes floats, not {x.dtype}")
    parameters = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    if any(parameter.dtype != x.dtype for parameter in parameters):
        raise ArtefactError(f"a {kind.__name__} of {parameters[0].dtype} does not take {x.dtype}")
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        shape = tuple(module.normalized_shape)
        if not shape or tuple(x.shape[-len(shape) :]) != shape:
            raise ArtefactError(f"a {kind.__name__} of {shape} does not take shape {tuple(x.shape)}")
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    if kind in _NORM_CHANNELS:
        channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
        if x.ndim not in _NORM_CHANNELS[kind] or x.shape[1] != channels:
            raise ArtefactError(f"a {kind.__name__} of {channels} channels does not take shape {tuple(x.shape)}")
        return torch.zeros_like(x)
    if isinstance(module, nn.PReLU) and module.num_parameters not in (1, x.shape[1] if x.ndim > 1 else 1):
        raise ArtefactError(f"a PReLU of {module.num_parameters} channels does not take shape {tuple(x.shape)}")
    if isinstance(module, nn.Softmax | nn.LogSoftmax) and not (
        type(module.dim) is int and -x.ndim <= module.dim < x.ndim
    ):
        raise ArtefactError(f"a softmax over dimension {module.dim} does not take shape {tuple(x.shape)}")
    if isinstance(module, (*_SAME, nn.PReLU, nn.Softmax, nn.LogSoftmax)):
        return torch.zeros_like(x)
    reserve(_elements(module, x))
    result: Tensor = module(x)
    return result


def _elements(module: nn.Module, x: Tensor) -> int:
    """The most elements that a module gives which changes sizes."""
    if type(module) in _RESIZING:
        return predicted_elements(_RESIZING[type(module)], (x, module.output_size), {})
    if isinstance(module, nn.ZeroPad2d):
        return predicted_elements("pad", (x, module.padding), {})
    if isinstance(module, nn.Unfold):
        return predicted_elements("unfold", (x, module.kernel_size, module.dilation, module.padding, module.stride), {})
    if isinstance(module, nn.Fold):
        places = (module.output_size, module.kernel_size, module.dilation, module.padding, module.stride)
        return predicted_elements("fold", (x, *places), {})
    if isinstance(module, nn.Upsample):
        given = {"size": module.size, "scale_factor": module.scale_factor, "mode": module.mode}
        return predicted_elements("interpolate", (x,), {**given, "align_corners": module.align_corners})
    return x.numel()


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: dict[str, Any], reserve: Reserve, mode: str = "zeros"
) -> Tensor:
    """Zeros of the shape of a convolution of x (B, in, *sizes) with a weight (out, in / groups, *kernel)."""
    axes = weight.ndim - 2
    groups = geometry["groups"]
    takes = x.ndim == axes + 2 and x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    same_dtype = {x.dtype, weight.dtype, *([] if bias is None else [bias.dtype])} == {x.dtype}
    if not takes or not same_dtype or not x.is_floating_point() or x.numel() == 0:
        raise ArtefactError(
            f"a convolution of {weight.dtype} {tuple(weight.shape)} in {groups} groups does not take {x.dtype} "
            f"{tuple(x.shape)}"
        )
    stride, dilation = (_for_each(geometry[key], axes) for key in ("stride", "dilation"))
    padding = geometry["padding"]
    if padding == "same" and any(step != 1 for step in stride):
        raise ArtefactError("a convolution padded to the same size has no stride")
    reach = [step * (size - 1) + 1 for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if padding in ("same", "valid"):
        pads = [size - 1 if padding == "same" else 0 for size in reach]
    else:
        pads = [2 * pad for pad in _for_each(padding, axes)]
    padded = [size + pad for size, pad in zip(x.shape[2:], pads, strict=True)]
    if mode != "zeros" and any(pad > 2 * (size - 1) for pad, size in zip(pads, x.shape[2:], strict=True)):
        raise ArtefactError(f"an image of {tuple(x.shape[2:])} cannot be padded by {pads} from itself")
    found = [(size - far) // step + 1 for size, far, step in zip(padded, reach, stride, strict=True)]
    if min(found) < 1:
        raise ArtefactError(f"a kernel that reaches {reach} does not fit into an image of {padded}")
    reserve(math.prod((*x.shape[:2], *padded)))
    shape = (x.shape[0], weight.shape[0], *found)
    reserve(math.prod(shape))
    return x.new_zeros(shape)


def _for_each(value: Any, axes: int) -> tuple[int, ...]:
    """A size for each axis. Raises ArtefactError where there are too few or too many."""
    found = (value,) * axes if type(value) is int else tuple(value)
    if len(found) != axes or not all(type(size) is int for size in found):
        raise ArtefactError(f"{value!r:.100} is not a size for each of {axes} axes")
    return found


def _check_quantizer(quantizer: Quantizer | None, x: Tensor) -> None:
    """Raise ArtefactError unless a quantizer takes x and keeps its shape."""
    if quantizer is None:
        return
    scale = getattr(quantizer, "scale", None)
    shape = scale.shape if isinstance(scale, Tensor) else torch.Size()
    fits = x.is_floating_point() and x.ndim > 0 and len(shape) <= x.ndim
    if not fits or any(
        size not in (1, wanted) for size, wanted in zip(reversed(shape), reversed(x.shape), strict=False)
    ):
        raise ArtefactError(f"a quantizer of scale {tuple(shape)} does not take {x.dtype} {tuple(x.shape)}")
