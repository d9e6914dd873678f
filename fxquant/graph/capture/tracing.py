"""From a Vision Transformer to one flat graph that computes the same: what every pass works on.

`trace` records a copy of the model at the size of an example image with the batch left free (`shape_tracer`), brings
the graph to one form (`normalization`), writes every node's shape into `meta["tensor_meta"]`, and accepts the result
only if it equals the model as it was given, with its hooks and replaced forwards, at two batch sizes. It never touches
the caller's model, its state or the example. Its tensors may
stand in tuples, lists, dicts and objects (`fxquant.graph.output_tree`). Not done: several inputs that vary, dynamic
image sizes.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.passes.shape_prop import ShapeProp

from fxquant.checks.arguments import number
from fxquant.checks.torch_modes import exact
from fxquant.errors import CoverageError, ModelError, OptionError, TraceError
from fxquant.graph.capture.equivalence import MOST_IMAGES, check_equivalence, checked_images, run_eagerly
from fxquant.graph.capture.exported import ProgramModule, exported, module_of_program
from fxquant.graph.capture.model_checks import check_example, check_model
from fxquant.graph.capture.normalization import normalize
from fxquant.graph.capture.plain_model import copy_of, has_own_code, settle_weights
from fxquant.graph.capture.shape_tracer import ShapeTracer
from fxquant.graph.facts import TRACED, declare
from fxquant.graph.names import with_valid_names
from fxquant.graph.nodes import device_of, image_of
from fxquant.graph.notes import CLASSES, COVERAGE, EXPORTED, IMAGE_SHAPE
from fxquant.graph.output_tree import TREE
from fxquant.graph.structure.class_scores import declared_classes

_ADVICE = (
    "Tensor operations may not decide which Python code runs: use torch.where and masks there, or move that code out "
    "of forward"
)
_ADVICE_ON_FLEX = (
    "flex_attention compiles itself and cannot be recorded: call scaled_dot_product_attention in its place, with a "
    "mask where it has one"
)
_LIBRARY_FOLDERS = (Path(torch.__file__).parent, Path(__file__).parents[2])


@exact()
@torch.no_grad()
def trace(
    model: nn.Module | ExportedProgram,
    example_bchw: torch.Tensor,
    *,
    minimum_coverage: float = 0.98,
    inputs: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """Trace a vision model in inference mode into a graph every pass understands.

    Args:
        model: takes one image tensor, returns tensors; it is copied, never changed. What `torch.compile` and
            `nn.DataParallel` wrap is traced itself. Hooks and replaced forwards are part of the graph; parametrized,
            normalized and pruned weights are plain weights of the value they have.
        example_bchw: finite float (B, C, H, W), moved to where the model is; the graph takes any B and this (C, H, W).
        minimum_coverage: least share, 0 to 1, of linear and convolution weight elements that must be visible in the
            graph.
        inputs: further arguments of the model's forward, by name, which keep these values in the graph.

    The result is `TRACED`. It returns one tensor or, where the model returns a tree of tensors, a tuple of them. It has
    the notes COVERAGE (share of weight elements seen) and IMAGE_SHAPE (C, H, W), see `fxquant.graph.notes`, and TREE
    for a tree, see `fxquant.graph.output_tree`; and `tensor_meta` on every node that holds a tensor. Parameters do not
    require gradients; its state is independent of the model's.

    Raises ModelError for a model that is quantized, scripted or cannot be copied, and for weights that are missing, on
    several devices, not float32 or float64, or not finite; CalibrationError for an example of the wrong kind or a size
    the model refuses; CoverageError for hidden weights; TraceError for everything else, naming the line of the model
    that stands in the way.
    """
    if isinstance(model, ExportedProgram):
        model = module_of_program(model)
    fixed = dict(inputs or {})
    check_model(model, fixed)
    check_example(example_bchw)
    if not 0 <= number("minimum_coverage", minimum_coverage, OptionError) <= 1:
        raise OptionError(f"minimum_coverage is a share from 0 to 1, not {minimum_coverage}")
    # In a batch of one, what all images share looks like the image's own: one image is taken twice.
    example_bchw = example_bchw.expand(max(len(example_bchw), 2), *example_bchw.shape[1:]).to(device_of(model))
    # A copy of its own, since running it may change its state.
    tree, expected = run_eagerly(copy_of(model, fixed), example_bchw)
    root = copy_of(model, fixed)
    classes = declared_classes(root)
    try:
        graph_module = _graph_of(root, example_bchw, expected, minimum_coverage)
    except CoverageError:
        raise
    except TraceError as error:
        if isinstance(model, ProgramModule):
            raise
        graph_module = _graph_by_export(copy_of(model, fixed), example_bchw, expected, minimum_coverage, error)
    if not tree.is_bare:
        TREE.write(graph_module, tree.to_json())
    if classes is not None:
        CLASSES.write(graph_module, classes)
    IMAGE_SHAPE.write(graph_module, tuple(example_bchw.shape[1:]))
    declare(graph_module, [TRACED])
    return graph_module


def _graph_by_export(
    root: nn.Module,
    example_bchw: torch.Tensor,
    expected: list[list[torch.Tensor]],
    minimum_coverage: float,
    error: TraceError,
) -> fx.GraphModule:
    """`_graph_of` what torch.export makes of a copy. Raises the error of tracing, with why this fails too.

    Args:
        root: a copy of the caller's model.
        example_bchw: float (B, C, H, W).
        expected: the model's own outputs for every checked batch size.
        minimum_coverage: as in `trace`.
        error: what tracing raised.
    """
    try:
        program = exported(root, checked_images(example_bchw, MOST_IMAGES))
        graph_module = _graph_of(program, example_bchw, expected, minimum_coverage)
    except Exception as second:  # whatever torch.export meets in the model's code
        reason = str(second).strip().partition("\n")[0]
        raise TraceError(f"{error}. torch.export does not take it either: {reason}") from error
    EXPORTED.write(graph_module, str(error))
    return graph_module


def _graph_of(
    root: nn.Module, example_bchw: torch.Tensor, expected: list[list[torch.Tensor]], minimum_coverage: float
) -> fx.GraphModule:
    """The normalized graph of a copy, with shapes and the note COVERAGE, once it gives what is expected."""
    settle_weights(root)
    for module in root.modules():
        if getattr(module, "fused_attn", None) is True:
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
    check_equivalence(graph_module, example_bchw, expected)
    COVERAGE.write(graph_module, coverage)
    return graph_module


def _record(root: nn.Module, example_bchw: torch.Tensor) -> tuple[fx.GraphModule, ShapeTracer]:
    tracer = ShapeTracer(example_bchw)
    try:
        graph = tracer.record(root)
    except Exception as error:
        advice = _ADVICE_ON_FLEX if "flex_attention" in str(error) else _ADVICE
        raise TraceError(
            f"{type(root).__name__} cannot be traced: {_place(root, tracer)}{_where(error)}: {error}. {advice}"
        ) from error
    return fx.GraphModule(root, with_valid_names(root, graph), class_name=type(root).__name__), tracer


def _place(root: nn.Module, tracer: ShapeTracer) -> str:
    """The module in which it failed, and whether hooks or a replaced forward of its own may be the reason."""
    path = tracer.failed_in
    if path is None:
        return ""
    module = root.get_submodule(path)
    own = ", which has hooks or a forward of its own that can be removed" if has_own_code(module) else ""
    return f"in '{path}' ({type(module).__name__}{own}): "


def _where(error: BaseException) -> str:
    """File and line of the deepest frame that is the model's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(Path(f.filename).is_relative_to(folder) for folder in _LIBRARY_FOLDERS)]
    frame = (own or list(frames))[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: `{frame.line}`"


def _coverage(root: nn.Module, graph_module: fx.GraphModule, tracer: ShapeTracer, minimum_coverage: float) -> float:
    """Share of weight elements that are visible; weights inside composite leaves are hidden."""
    hidden: dict[str, int] = {}
    seen = sum(p.numel() for p in root.parameters() if p.ndim >= 2 and id(p) in tracer.read_tensors)
    for path in {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}:
        module = graph_module.get_submodule(path)
        elements = sum(p.numel() for p in module.parameters() if p.ndim >= 2)
        if list(module.children()) or isinstance(module, nn.RNNBase):
            hidden[path] = elements
        else:
            seen += elements
    total = seen + sum(hidden.values())
    if total == 0:
        raise ModelError(f"{type(root).__name__} has no linear or convolution weights on the path of the image")
    if seen / total < minimum_coverage:
        biggest = sorted(hidden, key=lambda path: -hidden[path])[:5]
        kinds = {path: type(graph_module.get_submodule(path)).__name__ for path in biggest}
        listed = ", ".join(f"'{path}' ({kinds[path]}, {hidden[path]} elements)" for path in biggest)
        raise CoverageError(
            f"the graph shows {seen / total:.1%} of {total} weight elements, {minimum_coverage:.1%} are required; "
            f"hidden inside {listed}. Write them out with nn.Linear and torch.matmul; or leave them in float: run a "
            f"pipeline on fxquant.trace(model, images, minimum_coverage={int(seen / total * 100) / 100})"
        )
    return seen / total


def _propagate_shapes(graph_module: fx.GraphModule, example_bchw: torch.Tensor) -> None:
    """Write `tensor_meta` at the example's batch size, without computing."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    ShapeProp(graph_module, fake_mode=fake_mode).propagate(example_bchw)


def _guard_image_shape(graph_module: fx.GraphModule, image_shape: tuple[int, ...]) -> None:
    """Refuse images of another size at run time, which reshapes could otherwise mix up silently."""
    graph = graph_module.graph
    image = image_of(graph_module)
    message = f"this graph takes images of shape (B, {', '.join(map(str, image_shape))}): resize them or trace again"
    with graph.inserting_after(image):
        shape: Any = graph.call_function(getattr, (image, "shape"))
    with graph.inserting_after(shape):
        image_dimensions = graph.call_function(operator.getitem, (shape, slice(1, None)))
    with graph.inserting_after(image_dimensions):
        is_expected = graph.call_function(operator.eq, (image_dimensions, image_shape))
    with graph.inserting_after(is_expected):
        graph.call_function(torch._assert, (is_expected, message))
