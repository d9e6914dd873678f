"""The model's own outputs at two batch sizes, which the traced graph is held against."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxquant.checks.finite import is_finite
from fxquant.errors import CalibrationError, TraceError
from fxquant.graph.capture.leaves import has_global_hooks
from fxquant.graph.output_tree import Tree, flatten, leaves

_RELATIVE_TOLERANCE = 1e-4
_CHECKED_BATCH_SIZES = (1, 3)
MOST_IMAGES = max(_CHECKED_BATCH_SIZES)


def checked_images(example_bchw: torch.Tensor, batch_size: int) -> torch.Tensor:
    """A batch of different images made from the first one: it, and darker ones, which every model takes."""
    factors = torch.linspace(1, 0, batch_size + 1, device=example_bchw.device, dtype=example_bchw.dtype)[:-1]
    return example_bchw[:1] * factors.view(-1, 1, 1, 1)


def run_eagerly(root: nn.Module, example_bchw: torch.Tensor) -> tuple[Tree, list[list[torch.Tensor]]]:
    """How the model's own outputs are arranged, and their tensors for every checked batch size."""
    name = type(root).__name__
    try:
        sizes = (*_CHECKED_BATCH_SIZES, _CHECKED_BATCH_SIZES[0])
        outputs = [root(checked_images(example_bchw, batch_size)) for batch_size in sizes]
    except Exception as error:
        size = known_image_shape(root)
        known = f"; the model takes (B, {', '.join(map(str, size))})" if size else ""
        raise CalibrationError(
            f"{name} refuses an example of shape {tuple(example_bchw.shape)} and dtype "
            f"{example_bchw.dtype}{known}: {error}"
        ) from error
    (tree, one), (other, several), (_, again) = (flatten(output) for output in outputs)
    if not one:
        raise TraceError(f"{name} returns a {type(outputs[0]).__name__} without a tensor, so nothing can be quantized")
    if tree != other:
        raise TraceError(
            f"{name} returns something else for {_CHECKED_BATCH_SIZES[1]} images than for one, besides its tensors: "
            "wrap it in a module whose forward returns the tensors to quantize for"
        )
    if not all(is_finite(tensor) for tensor in (*one, *several)):
        raise CalibrationError(
            f"{name} gives NaN or infinite numbers for the example, or for the same image darker: "
            "preprocess images as the model wants them, and check its weights"
        )
    for where, single, three in zip(tree.names, one, several, strict=True):
        is_constant = single.shape == three.shape and len(one) > 1
        if three.numel() != single.numel() * _CHECKED_BATCH_SIZES[1] and not is_constant:
            at = f" at {where}" if where else ""
            raise TraceError(
                f"{name} gives {single.numel()} numbers{at} for one image and {three.numel()} for "
                f"{_CHECKED_BATCH_SIZES[1]}: wrap it in a module whose forward returns as much for every image of the "
                "batch"
            )
    for after, before in zip(again, one, strict=True):
        difference = _difference(after, before)
        if not difference <= _tolerance(before):
            raise TraceError(
                f"{name} differs from the model it was two calls before: the same image has outputs "
                f"{difference:.3g} apart. Its forward draws at random or keeps a state: take that out of inference; "
                "where it takes what it would draw as an argument (ViTMAE's noise), wrap it in a module that gives it"
            )
    return tree, [one, several]


def _is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same elements, where NaN is the same as NaN."""
    return torch.equal(tensor, other) or bool(((tensor == other) | (tensor.isnan() & other.isnan())).all())


def _difference(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference of two outputs; infinite where their shapes differ."""
    if output.shape != reference.shape:
        return float("inf")
    return float((output.double() - reference.double()).abs().max()) if output.numel() else 0.0


def _tolerance(reference: torch.Tensor) -> float:
    largest = float(reference.double().abs().max()) if reference.numel() else 0.0
    return _RELATIVE_TOLERANCE * max(largest, 1e-6)


def known_image_shape(model: nn.Module) -> tuple[int, ...] | None:
    """(C, H, W) from the usual places: a patch embedding's image size, timm's default configuration."""
    for module in model.modules():
        size, projection = getattr(module, "img_size", None), getattr(module, "proj", None)
        if isinstance(size, tuple) and len(size) == 2 and isinstance(projection, nn.Conv2d):
            return (projection.in_channels, *size)
    configuration = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return tuple(configuration["input_size"]) if configuration and "input_size" in configuration else None


def check_equivalence(
    graph_module: fx.GraphModule, example_bchw: torch.Tensor, expected: list[list[torch.Tensor]]
) -> None:
    """Raise TraceError unless the graph computes what the model did, and keeps no state.

    Args:
        graph_module: the traced graph.
        example_bchw: float (B, C, H, W), of which the checked batches are made.
        expected: the model's own outputs for every checked batch size, tensor by tensor.
    """
    before = {name: buffer.clone() for name, buffer in graph_module.named_buffers()}
    for batch_size, references in zip(_CHECKED_BATCH_SIZES, expected, strict=True):
        try:
            output = graph_module(checked_images(example_bchw, batch_size))
        except Exception as error:
            raise TraceError(f"the traced graph fails at batch size {batch_size}: {error}") from error
        for found, reference in zip(leaves(output), references, strict=True):
            difference, tolerance = _difference(found, reference), _tolerance(reference)
            if difference <= tolerance:
                continue
            hooks = "hooks are registered for all modules of the process, remove them; else " * has_global_hooks()
            raise TraceError(
                f"the traced graph differs from the model by {difference:.3g} at batch size {batch_size} "
                f"(tolerance {tolerance:.3g}): {hooks}its forward depends on the batch size, on randomness or on a "
                "state, or it changes a tensor in place that it reads under another name"
            )
    changed = [name for name, buffer in graph_module.named_buffers() if not _is_same(buffer, before[name])]
    if changed:
        raise TraceError(
            f"the forward of the model changes '{changed[0]}', and a quantized model keeps no state: take that out of "
            f"inference"
        )
