"""What nodes hold for two and for three images: which sizes are the batch's, and which only look like it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from fxquant.graph.nodes import image_of
from passes.lower.integer_plan import shape_of

COUNTS = (2, 3)


class BatchShapes:
    """By node and number of images, what a node gives: shapes of tensors, everything else as it is.

    Nothing is computed but shapes. A graph that cannot be run so has no known shapes.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph_module = graph_module
        self._found: list[dict[Node, Any]] | None = None  # when first asked for

    @property
    def values(self) -> list[dict[Node, Any]]:
        """By place in COUNTS, what each node gives: a torch.Size for a tensor."""
        if self._found is None:
            self._found = _recorded(self._graph_module) or [{} for _ in COUNTS]
        return self._found

    def copy(self, node: Node, like: Node) -> None:
        """A new node gives what another does."""
        for values in self._found or []:
            if like in values:
                values[node] = values[like]

    def by_image(self, node: Node) -> tuple[int, ...] | None:
        """(n, ...) where a node holds (n B, ...) for any B images; None for everything else."""
        two, three = (values.get(node) for values in self.values)
        if not isinstance(two, torch.Size) or not isinstance(three, torch.Size) or not two or two[1:] != three[1:]:
            return None
        return (two[0] // 2, *two[1:]) if two[0] % 2 == 0 and 3 * two[0] == 2 * three[0] else None


def _recorded(graph_module: GraphModule) -> list[dict[Node, Any]] | None:
    shape = shape_of(image_of(graph_module))
    if shape is None:
        return None
    found = []
    for count in COUNTS:
        interpreter = Interpreter(graph_module, garbage_collect_values=False)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                interpreter.run(torch.empty((count, *shape[1:])))
        except Exception:  # whatever an operation without fake tensors raises
            return None
        results = interpreter.env.items()
        found.append({node: result.shape if isinstance(result, Tensor) else result for node, result in results})
    return found
