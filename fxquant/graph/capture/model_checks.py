"""What is no model to quantize, and what is no image to trace it with; every refusal names the part and the remedy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxquant.checks.arguments import shown
from fxquant.checks.finite import is_finite
from fxquant.errors import CalibrationError, ModelError, TraceError
from fxquant.graph.facts import LOWERED, QUANTIZED, facts_of


def check_model(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> None:
    """Raise ModelError unless a model can be quantized: not quantized yet, finite float32 or float64, on one device.

    inputs: what its forward is given besides the images, by name.

    Raises TraceError where its forward needs more than the images and these, or takes no such argument.
    """
    if not isinstance(model, nn.Module):
        hint = f": write {model.__name__}()" if isinstance(model, type) else ""
        raise ModelError.for_type(f"a torch.nn.Module is traced, not {shown(model)}{hint}")
    for path, module in model.named_modules():
        _check_module(model, path, module)
    if any(kind.__name__ == "GeneralizedRCNN" for kind in type(model).__mro__):
        raise ModelError(
            f"{type(model).__name__} is a detector, which takes a list of pictures and keeps boxes by their values: "
            f"call fxquant.compile_detector(detector, budget, calibration=pictures)"
        )
    parameters = list(model.named_parameters())
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no parameters: there is nothing to quantize")
    for name, tensor in parameters:
        _check_storage(f"parameter '{name}'", tensor)
        _check_values(f"parameter '{name}'", tensor)
    for name, buffer in model.named_buffers():
        _check_storage(f"buffer '{name}'", buffer)
    _check_device(model)
    _check_arguments(model, inputs or {})


def _check_module(model: nn.Module, path: str, module: nn.Module) -> None:
    kind = type(module)
    if isinstance(module, fx.GraphModule) and facts_of(module) & {QUANTIZED, LOWERED}:
        raise ModelError(
            f"{type(model).__name__} is quantized already: give the float model it was made from, an artefact does "
            f"not hold its weights"
        )
    if kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        raise ModelError(
            f"'{path}' is a {kind.__name__}, quantized already: give the float model that it was made from"
        )
    if isinstance(module, torch.jit.ScriptModule):
        what = f"'{path}' in {type(model).__name__}" if path else "the model"
        raise ModelError(
            f"{what} is scripted or traced by torch.jit, which keeps no Python code to trace: give the nn.Module that "
            f"it was made from, with its weights"
        )


def _check_storage(what: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ModelError(f"{what} has no shape yet, it belongs to a lazy module: call the model on one image first")
    if tensor.device.type == "meta":
        raise ModelError(
            f"{what} is on the meta device, where it has a shape and no values: call model.to_empty(device='cpu'), "
            f"then load its weights"
        )
    if is_traceable_wrapper_subclass(tensor):
        raise ModelError(
            f"{what} is a {type(tensor).__name__}, not a plain tensor: give the float model it was made from"
        )
    if tensor.layout != torch.strided:
        raise ModelError(f"{what} has the layout {tensor.layout}: make it dense with .to_dense()")


def _check_device(model: nn.Module) -> None:
    """Raise ModelError where parameters and buffers are on several devices, naming two."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    first, tensor = named[0]
    for name, other in named:
        if other.device != tensor.device:
            raise ModelError(
                f"'{first}' is on {tensor.device} and '{name}' is on {other.device}, and a model is compiled on one "
                f"device: move all of it there, model.to('{tensor.device}')"
            )


def _check_values(what: str, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise ModelError(
            f"{what} is {tensor.dtype}: complex weights cannot be quantized; keep their real and imaginary "
            "parts as two tensors"
        )
    if not tensor.is_floating_point():
        raise ModelError(
            f"{what} is {tensor.dtype}, not float: pass the model before it is quantized, and register what is no "
            f"weight with register_buffer"
        )
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"{what} is {tensor.dtype}, too coarse to search scales with: pass model.float() and float32 images; what "
            f"comes out is as small and as fast"
        )
    if not is_finite(tensor):
        raise ModelError(f"{what} has NaN or infinite values: load or train the weights again")


def _check_arguments(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    image = next((p.name for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD), None)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for given in inputs:
        if given == image:
            raise TraceError(f"'{given}' of {name}.forward stands for the images: inputs are what comes besides them")
        if given not in parameters and not takes_any:
            raise TraceError(f"{name}.forward takes no '{given}'; it takes {', '.join(parameters)}")
    required = [
        p
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in inputs
    ]
    if required and required[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise TraceError(
            f"{name}.forward takes '{required[0].name}' by keyword only: wrap it in a module that takes images as its "
            f"first argument"
        )
    if len(required) > 1:
        more = ", ".join(f"'{p.name}': ..." for p in required[1:])
        raise TraceError(
            f"{name}.forward needs {len(required)} arguments ({', '.join(p.name for p in required)}): give those that "
            f"are the same for all images, inputs={{{more}}}, or wrap it in a module that takes images only"
        )


def check_example(example_bchw: Tensor) -> None:
    """Raise CalibrationError unless the example is a finite float tensor (B, C, H, W)."""
    if not isinstance(example_bchw, Tensor):
        raise CalibrationError.for_type(f"the example is a {type(example_bchw).__name__}, not a tensor (B, C, H, W)")
    if example_bchw.ndim != 4 or example_bchw.numel() == 0:
        raise CalibrationError(f"the example has shape {tuple(example_bchw.shape)}; images are (B, C, H, W), B >= 1")
    if not example_bchw.is_floating_point():
        raise CalibrationError(f"the example is {example_bchw.dtype}; scale the images to float first")
    if example_bchw.is_meta:
        raise CalibrationError("the example is on the meta device, where it has a shape and no values: give images")
    if example_bchw.layout is not torch.strided:
        raise CalibrationError(f"the example is {example_bchw.layout}, not a plain tensor: give images.to_dense()")
    if not is_finite(example_bchw):
        raise CalibrationError("the example has NaN or infinite values: give one whose values are finite")
