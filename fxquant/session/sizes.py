"""Other image sizes: which are asked for, and the model at each of them.

A graph takes images of one size. `fxquant.compile(..., image_sizes=[(256, 320)])` traces the model at further sizes,
and passes make a graph for each that shares every layer with the first (`passes.substitute.add_sizes`). It is proven on
the first two calibration images, resized.

Deliberately not done: sizes that nobody has declared. Whatever a model computes of its own size (position embeddings,
masks, windows) is Python that neither a graph nor a file keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from fxquant.artefact.graph_json import MOST_SIZES
from fxquant.checks.arguments import shown, whole
from fxquant.errors import CalibrationError, OptionError, TraceError
from fxquant.graph.capture.plain_model import copy_of
from fxquant.graph.capture.tracing import trace
from fxquant.graph.output_tree import TREE, flat
from fxquant.graph.structure.channel_paths import channel_paths
from passes.pipeline.contract import PassContext, SizedModel
from passes.prepare.assign_roles import AssignRoles

_LARGEST = 2**16  # pixels along one side


def checked_sizes(sizes: Iterable[Any]) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width), each once. Raises OptionError for anything else, and for more than MOST_SIZES."""
    found: dict[tuple[int, int], None] = {}
    for size in sizes:
        if not isinstance(size, tuple | list) or len(size) != 2:
            raise OptionError.for_type(f"image_sizes are pairs (height, width), not {shown(size)}")
        height, width = (whole("a side in image_sizes", side, OptionError, least=1, most=_LARGEST) for side in size)
        found[height, width] = None
    if len(found) > MOST_SIZES:
        raise OptionError(
            f"image_sizes has {len(found)} sizes, and each takes a graph of its own: give at most {MOST_SIZES}, and "
            f"resize or pad other images to one of them"
        )
    return tuple(found)


def sized_model(
    model: nn.Module, images_bchw: Tensor, size: tuple[int, int], main: GraphModule, inputs: Mapping[str, Any] | None
) -> SizedModel:
    """The model at one size.

    Args:
        model: the caller's.
        images_bchw: two images, float (2, C, H, W), of any size.
        size: height and width.
        main: the model traced at the main size.
        inputs: arguments of its forward besides the images, by name.

    Raises as `fxquant.trace`, naming the size; TraceError also where the model returns another tree of tensors.
    """
    resized = functional.interpolate(images_bchw, size, mode="bilinear", align_corners=False)
    try:
        graph_module = trace(model, resized, inputs=inputs)
    except (TraceError, CalibrationError) as error:
        raise type(error)(f"at the size {size} of image_sizes: {error}") from error
    if TREE.get(graph_module) != TREE.get(main):
        raise TraceError(f"at the size {size} of image_sizes the model returns other tensors than at its main size")
    AssignRoles().apply(graph_module, PassContext())
    paths = channel_paths(graph_module, resized)
    padded = frozenset(node.name for node, path in paths.items() if path.padded)
    read = {str(node.target).rpartition(".")[0] for node in graph_module.graph.nodes if node.op == "get_attr"}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target not in read:
            graph_module.get_submodule(str(node.target)).to("meta")  # the main graph has its weights
    with torch.no_grad():
        expected = flat(copy_of(model, inputs)(resized.clone()))[1]
    return SizedModel(graph_module, resized, expected, padded)
