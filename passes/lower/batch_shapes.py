"""What nodes hold for two and for three images: which sizes are the batch's, and which only look like it.

Notes stand in the nodes, so that rewrites that come later read them; a graph in planning can no longer be run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from fxquant.graph.facts import Fact
from fxquant.graph.nodes import image_of, input_of, module_of
from passes.lower.integer_plan import moves, shape_of
from passes.lower.moved import COUNTS
from passes.lower.rewrite import REQUIRES
from passes.pipeline.contract import PassContext

_NOTED = "fxquant_batch_values"


@dataclass(frozen=True)
class NoteBatchShapes:
    """Note what nodes hold, where a layer norm is right before or behind something that moves numbers.

    There may be rows to order; for everything else nothing is noted, since it takes as long as all other rewrites.
    """

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Note in place; returns for how many nodes."""
        norms = [node for node in graph_module.graph.nodes if isinstance(module_of(graph_module, node), nn.LayerNorm)]
        is_moved = any(moves(input_of(norm)) or any(map(moves, norm.users)) for norm in norms)
        return note_batch_shapes(graph_module) if is_moved else 0


def has_batch_shapes(graph_module: GraphModule) -> bool:
    """Whether any node has notes."""
    return any(_NOTED in node.meta for node in graph_module.graph.nodes)


def note_batch_shapes(graph_module: GraphModule) -> int:
    """Note of every node what it gives for each number in COUNTS; returns for how many nodes it is known.

    Nothing is computed but shapes. Of a graph that cannot be run so, it is noted that nothing is known.
    """
    found = [_values(graph_module, count) for count in COUNTS]
    for node in graph_module.graph.nodes:
        node.meta[_NOTED] = tuple(values.get(node) for values in found)
    return len(found[0])


def _values(graph_module: GraphModule, count: int) -> dict[Node, Any]:
    shape = shape_of(image_of(graph_module))
    if shape is None:
        return {}
    interpreter = Interpreter(graph_module, garbage_collect_values=False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            interpreter.run(torch.empty((count, *shape[1:])))
    except Exception:  # whatever an operation without fake tensors raises
        return {}
    results = interpreter.env.items()
    return {node: result.shape if isinstance(result, Tensor) else result for node, result in results}


def forget_batch_shapes(graph_module: GraphModule) -> None:
    """Drop all notes."""
    for node in graph_module.graph.nodes:
        node.meta.pop(_NOTED, None)


def batch_values(node: Node) -> tuple[Any, ...]:
    """By place in COUNTS, what a node gives: a torch.Size for a tensor, everything else as it is; None: not known."""
    found: tuple[Any, ...] = node.meta.get(_NOTED, (None,) * len(COUNTS))
    return found


def copy_batch_values(node: Node, like: Node) -> None:
    """A new node gives what another does."""
    if _NOTED in like.meta:
        node.meta[_NOTED] = like.meta[_NOTED]


def by_image(node: Node) -> tuple[int, ...] | None:
    """(n, ...) where a node holds (n B, ...) for any B images; None for everything else."""
    two, three = batch_values(node)
    if not isinstance(two, torch.Size) or not isinstance(three, torch.Size) or not two or two[1:] != three[1:]:
        return None
    return (two[0] // 2, *two[1:]) if two[0] % 2 == 0 and 3 * two[0] == 2 * three[0] else None
