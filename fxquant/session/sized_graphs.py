"""The graphs of a quantized model for images of other sizes than its main one.

They call the modules of the main graph, so weights, quantizers and folds are there once. What each has of its own are
constants: position embeddings, masks, relative positions. These are buffers of this module, so that they are part of
the model's state and move to another device with it; `point` lets the graphs read them from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import OptionError
from fxquant.graph.nodes import constants_by_path
from fxquant.runtime.border import Border

Size = tuple[int, int]


class SizedGraphs(nn.Module):
    """By (height, width), a graph for images of that size.

    Args:
        main: the graph of the main size.
        graphs: the others.
    """

    def __init__(self, main: GraphModule, graphs: Mapping[Size, GraphModule]) -> None:
        super().__init__()
        self.graphs = dict(graphs)  # no child of this module: what they call is the main graph's
        self._borders = {size: Border.of(graph) for size, graph in graphs.items()}
        shared = constants_by_path(main)
        for size, graph in graphs.items():
            for path, tensor in constants_by_path(graph).items():
                if path not in shared:
                    self.register_buffer(_name(size, path), tensor.detach())
        self.point(main)

    def at(self, images: Any) -> tuple[GraphModule, Border] | None:
        """The graph for images (B, C, H, W) of this size, and its border; None where there is none."""
        size: Any = tuple(images.shape[2:]) if isinstance(images, Tensor) and images.ndim == 4 else None
        return (self.graphs[size], self._borders[size]) if size in self.graphs else None

    def named(self, size: Any, main: Size) -> GraphModule | None:
        """The graph of a size that a caller names; None for the main one. Raises OptionError for any other."""
        found = tuple(size) if isinstance(size, tuple | list) else size
        if found == main:
            return None
        if found not in self.graphs:
            raise OptionError(f"the model takes images of {described([main, *self.graphs])}, not of {size!r:.100}")
        return self.graphs[found]

    def point(self, main: GraphModule) -> None:
        """Let the graphs read their constants from here, and from the main graph those that it has too."""
        shared = constants_by_path(main)
        for size, graph in self.graphs.items():
            for path in constants_by_path(graph):
                owner, _, name = path.rpartition(".")
                module = graph.get_submodule(owner)
                module._parameters.pop(name, None)
                module._buffers[name] = shared[path] if path in shared else self.get_buffer(_name(size, path))


def _name(size: Size, path: str) -> str:
    """What a constant is called here: a name without dots."""
    return f"{size[0]}x{size[1]}/{path.replace('.', '/')}"


def described(sizes: list[Size]) -> str:
    """Sizes in a message: "224 x 224, 256 x 320"."""
    return ", ".join(f"{height} x {width}" for height, width in sizes)


def share_tensors(main: nn.Module, other: nn.Module) -> None:
    """Let `other` hold the tensors of `main` that equal its own under the same name, such as packed weights."""
    modules = dict(main.named_modules())
    for path, module in other.named_modules():
        for name, tensor in module._buffers.items():
            same = modules[path]._buffers.get(name) if path in modules else None
            if tensor is not None and same is not None and _equal(same, tensor):
                module._buffers[name] = same


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
    return alike and bool((one == other).all())
