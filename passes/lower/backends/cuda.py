"""Linear layers through torch's int8 products on a GPU; the rest of the model runs there in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from fxquant.errors import BackendError
from fxquant.graph.facts import Fact
from fxquant.graph.nodes import image_of
from fxquant.graph.notes import execution_of
from fxquant.quantizers.families import UNIFORM_FAMILIES
from fxquant.runtime.integer.torch_linear import IntMmLinear
from passes.lower.backend import Backend
from passes.lower.rewrite import REQUIRES
from passes.lower.rewrites.exchange_linears import UNIFORM_INSTEAD, ExchangeLinears, uniform_linears
from passes.pipeline.contract import PassContext

_KERNEL = "linear cuda"
_INT8_CORES = (7, 5)  # compute capability


def _why_absent() -> BackendError | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= _INT8_CORES:
        return None
    return BackendError("'cuda' needs a GPU with int8 tensor cores and a torch built for it; use 'auto'")


@dataclass(frozen=True)
class MoveToGpu:
    """Move the model to the GPU, where a layer runs as integers; images and scores stay where the caller has images.

    device: where torch has the GPU; products of bytes run on its CPU, too, which tests use.
    """

    device: str = "cuda"

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Move in place; returns how many nodes were added."""
        graph = graph_module.graph
        image, output = image_of(graph_module), graph.output_node()
        before = len(graph.nodes)
        if _KERNEL not in execution_of(graph_module).values() or self._is_moved(graph_module):
            return 0
        graph_module.to(self.device)
        with graph.inserting_after(image):
            there = graph.call_method("to", (image, self.device))
        there.meta.update(image.meta)
        image.replace_all_uses_with(there, delete_user_cb=lambda user: user is not there)
        with graph.inserting_before(output):
            home = graph.call_function(getattr, (image, "device"))
            output.args = torch.fx.node.map_arg(output.args, lambda scores: graph.call_method("to", (scores, home)))
        return len(graph.nodes) - before

    def _is_moved(self, graph_module: GraphModule) -> bool:
        return any(user.target == "to" and user.args[1:] == (self.device,) for user in image_of(graph_module).users)


BACKEND = Backend(
    name="cuda",
    summary="linear layers, by torch on a GPU",
    families=UNIFORM_FAMILIES,
    edges=("post_gelu", "post_relu", "other"),
    instead=UNIFORM_INSTEAD,
    finds=uniform_linears,
    why_absent=_why_absent,
    pipeline=(ExchangeLinears(IntMmLinear, _KERNEL), MoveToGpu()),
)
