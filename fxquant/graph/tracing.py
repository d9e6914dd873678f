"""From a Vision Transformer to one flat graph that computes the same: what every pass works on.

`trace` records the model at the size of an example image with the batch left free (`shape_tracer`), brings the graph
to one form (`normalization`), writes every node's shape into `meta["tensor_meta"]`, and accepts the result only if it
equals the eager model at two batch sizes. It never touches the caller's model. Not done: several inputs, several
outputs, dynamic image sizes.
"""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

from fxquant.arguments import number, shown
from fxquant.errors import CalibrationError, CoverageError, ModelError, OptionError, TraceError
from fxquant.graph.annotation import Fact, declare, facts_of
from fxquant.graph.normalization import normalize
from fxquant.graph.shape_tracer import ShapeTracer

_RELATIVE_TOLERANCE = 1e-4
_CHECKED_BATCH_SIZES = (1, 3)
_LIBRARY_FOLDERS = (Path(torch.__file__).parent, Path(__file__).parents[1])


def trace(model: nn.Module, example_bchw: torch.Tensor, *, minimum_coverage: float = 0.98) -> fx.GraphModule:
    """Trace a vision model in inference mode into a graph every pass understands.

    model: takes one image tensor, returns one tensor; it is copied, never changed. example_bchw: finite float
    (B, C, H, W) on the model's device; the graph takes any B and exactly this (C, H, W). minimum_coverage: least
    share, 0 to 1, of linear and convolution weight elements that must be visible in the graph.

    The result declares `Fact.TRACED`, has `meta["coverage"]` (share of weight elements seen) and
    `meta["image_shape"]` (C, H, W), and `tensor_meta` on every node that holds a tensor. Parameters do not require
    gradients; its state is independent of the model's.

    Raises ModelError for a quantized model and for weights that are missing, not float32 or float64, or not finite;
    CalibrationError for an example of the wrong kind or a size the model refuses; CoverageError for hidden weights;
    TraceError for everything else, naming the line of the model that stands in the way.
    """
    check_model(model)
    _check_example(example_bchw)
    if not 0 <= number("minimum_coverage", minimum_coverage, OptionError) <= 1:
        raise OptionError(f"minimum_coverage is a share from 0 to 1, not {minimum_coverage}")
    root = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        expected = _run_eagerly(root, example_bchw)
        for module in root.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010
        graph_module, tracer = _record(root, example_bchw)
        coverage = _coverage(root, graph_module, tracer, minimum_coverage)
        graph_module = normalize(graph_module)
        _guard_image_shape(graph_module, tuple(example_bchw.shape[1:]))
        for node in graph_module.graph.nodes:
            node.type = None  # a graph read from a file has no annotations, and the same code is to look the same
        _propagate_shapes(graph_module, example_bchw)
        graph_module.graph.lint()
        graph_module.recompile()
        _check_equivalence(graph_module, example_bchw, expected)
    graph_module.meta["coverage"] = coverage
    graph_module.meta["image_shape"] = tuple(example_bchw.shape[1:])
    declare(graph_module, frozenset({Fact.TRACED}))
    return graph_module


def check_model(model: nn.Module) -> None:
    """Raise ModelError unless a model can be quantized: not quantized yet, finite float32 or float64 weights."""
    if not isinstance(model, nn.Module):
        hint = f": write {model.__name__}()" if isinstance(model, type) else ""
        raise ModelError.for_type(f"a torch.nn.Module is traced, not {shown(model)}{hint}")
    for module in model.modules():
        if _is_quantized(module):
            raise ModelError(
                f"{type(model).__name__} is quantized already: give the float model it was made from, an artefact does "
                f"not hold its weights"
            )
    parameters = list(model.named_parameters())
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no parameters: there is nothing to quantize")
    for name, tensor in (*parameters, *model.named_buffers()):
        if name in dict(parameters) and not tensor.is_floating_point():
            raise ModelError(f"parameter '{name}' is {tensor.dtype}, not float: pass the model before it is quantized")
        if name in dict(parameters) and not torch.isfinite(tensor).all():
            raise ModelError(f"parameter '{name}' has NaN or infinite values: load or train the weights again")
        if name in dict(parameters) and tensor.dtype not in (torch.float32, torch.float64):
            raise ModelError(
                f"parameter '{name}' is {tensor.dtype}, too coarse to search scales with: pass model.float() and "
                f"float32 images; what comes out is as small and as fast"
            )


def _is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized graph of ours, or one of torch's quantized layers."""
    ours = isinstance(module, fx.GraphModule) and bool(facts_of(module) & {Fact.QUANTIZED, Fact.LOWERED})
    return ours or type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))


def _check_example(example_bchw: torch.Tensor) -> None:
    if not isinstance(example_bchw, torch.Tensor):
        raise CalibrationError.for_type(f"the example is a {type(example_bchw).__name__}, not a tensor (B, C, H, W)")
    if example_bchw.ndim != 4 or example_bchw.numel() == 0:
        raise CalibrationError(f"the example has shape {tuple(example_bchw.shape)}; images are (B, C, H, W), B >= 1")
    if not example_bchw.is_floating_point():
        raise CalibrationError(f"the example is {example_bchw.dtype}; scale the images to float first")
    if not torch.isfinite(example_bchw).all():
        raise CalibrationError("the example has NaN or infinite values")


def _images(example_bchw: torch.Tensor, batch_size: int) -> torch.Tensor:
    """A batch of different images made from the first one."""
    factors = torch.linspace(1, -1, batch_size + 1, device=example_bchw.device, dtype=example_bchw.dtype)[:-1]
    return example_bchw[:1] * factors.view(-1, 1, 1, 1)


def _run_eagerly(root: nn.Module, example_bchw: torch.Tensor) -> list[torch.Tensor]:
    """The model's own outputs for every checked batch size."""
    try:
        outputs = [root(_images(example_bchw, batch_size)) for batch_size in _CHECKED_BATCH_SIZES]
    except Exception as error:
        size = known_image_shape(root)
        known = f"; the model takes (B, {', '.join(map(str, size))})" if size else ""
        raise CalibrationError(
            f"{type(root).__name__} refuses an example of shape {tuple(example_bchw.shape)} and dtype "
            f"{example_bchw.dtype}{known}: {error}"
        ) from error
    for output in outputs:
        if not isinstance(output, torch.Tensor):
            raise TraceError(
                f"{type(root).__name__} returns a {type(output).__name__}, not one tensor: wrap it in a module whose "
                "forward returns the tensor to quantize for"
            )
    return outputs


def known_image_shape(model: nn.Module) -> tuple[int, ...] | None:
    """(C, H, W) from the usual places: a patch embedding's image size, timm's default configuration."""
    for module in model.modules():
        size, projection = getattr(module, "img_size", None), getattr(module, "proj", None)
        if isinstance(size, tuple) and len(size) == 2 and isinstance(projection, nn.Conv2d):
            return (projection.in_channels, *size)
    configuration = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return tuple(configuration["input_size"]) if configuration and "input_size" in configuration else None


def _record(root: nn.Module, example_bchw: torch.Tensor) -> tuple[fx.GraphModule, ShapeTracer]:
    required = [p for p in inspect.signature(root.forward).parameters.values() if p.default is p.empty]
    if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required) > 1:
        raise TraceError(f"{type(root).__name__}.forward needs {len(required)} arguments: wrap it to take images only")
    tracer = ShapeTracer(example_bchw)
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise TraceError(
            f"{type(root).__name__} cannot be traced: {_where(error)}: {error}. Tensor operations may not decide which "
            "Python code runs, and tensors may not be assigned into: use torch.where, masks and torch.cat there, or "
            "move that code out of forward"
        ) from error
    return fx.GraphModule(root, graph, class_name=type(root).__name__), tracer


def _where(error: BaseException) -> str:
    """File and line of the deepest frame that is the model's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(Path(f.filename).is_relative_to(folder) for folder in _LIBRARY_FOLDERS)]
    frame = (own or list(frames))[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: `{frame.line}`"


def _coverage(root: nn.Module, graph_module: fx.GraphModule, tracer: ShapeTracer, minimum_coverage: float) -> float:
    """Share of weight elements that are visible; weights inside composite leaves are hidden."""
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    hidden: dict[str, int] = {}
    seen = sum(p.numel() for p in root.parameters() if p.ndim >= 2 and id(p) in tracer.read_tensors)
    for path in called:
        module = root.get_submodule(path)
        elements = sum(p.numel() for p in module.parameters() if p.ndim >= 2)
        is_opaque = bool(list(module.children())) or isinstance(module, (nn.MultiheadAttention, nn.RNNBase))
        if is_opaque:
            hidden[path] = elements
        else:
            seen += elements
    total = seen + sum(hidden.values())
    if total == 0:
        raise ModelError(f"{type(root).__name__} has no linear or convolution weights on the path of the image")
    if seen / total < minimum_coverage:
        biggest = sorted(hidden, key=lambda path: -hidden[path])[:5]
        listed = ", ".join(f"'{p}' ({type(root.get_submodule(p)).__name__}, {hidden[p]} elements)" for p in biggest)
        raise CoverageError(
            f"the graph shows {seen / total:.1%} of {total} weight elements, {minimum_coverage:.1%} are required; "
            f"hidden inside {listed}: write them out with nn.Linear and torch.matmul, or lower minimum_coverage"
        )
    return seen / total


def _propagate_shapes(graph_module: fx.GraphModule, example_bchw: torch.Tensor) -> None:
    """Write `tensor_meta` at the example's batch size, without computing."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    ShapeProp(graph_module, fake_mode=fake_mode).propagate(example_bchw)


def _guard_image_shape(graph_module: fx.GraphModule, image_shape: tuple[int, ...]) -> None:
    """Refuse images of another size at run time, which reshapes could otherwise mix up silently."""
    graph = graph_module.graph
    image = next(node for node in graph.nodes if node.op == "placeholder")
    message = f"this graph takes images of shape (B, {', '.join(map(str, image_shape))}): resize them or trace again"
    with graph.inserting_after(image):
        shape: Any = graph.call_function(getattr, (image, "shape"))
    with graph.inserting_after(shape):
        image_dimensions = graph.call_function(operator.getitem, (shape, slice(1, None)))
    with graph.inserting_after(image_dimensions):
        is_expected = graph.call_function(operator.eq, (image_dimensions, image_shape))
    with graph.inserting_after(is_expected):
        graph.call_function(torch._assert, (is_expected, message))


def _check_equivalence(graph_module: fx.GraphModule, example_bchw: torch.Tensor, expected: list[torch.Tensor]) -> None:
    for batch_size, reference in zip(_CHECKED_BATCH_SIZES, expected, strict=True):
        try:
            output = graph_module(_images(example_bchw, batch_size))
        except Exception as error:
            raise TraceError(f"the traced graph fails at batch size {batch_size}: {error}") from error
        difference = float((output - reference).abs().max()) if output.shape == reference.shape else float("inf")
        tolerance = _RELATIVE_TOLERANCE * max(float(reference.abs().max()), 1e-6)
        if not difference <= tolerance:
            raise TraceError(
                f"the traced graph differs from the model by {difference:.3g} at batch size {batch_size} "
                f"(tolerance {tolerance:.3g}): its forward depends on the batch size, on randomness or on a state, "
                "or it changes tensors in place"
            )
