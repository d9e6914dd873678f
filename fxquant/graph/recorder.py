"""Running a graph on one batch while keeping what passes through watched nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.graph.annotation import Role, annotation_of


class Recorder(Interpreter):
    """Keeps inputs of watched nodes for one batch, and the tensors whose gradients their metric needs."""

    def __init__(self, graph_module: GraphModule, watched: set[Node]) -> None:
        super().__init__(graph_module)
        self.watched = watched
        self.inputs: dict[Node, tuple[Tensor, ...]] = {}
        self.differentiated: dict[Node, Tensor] = {}

    def forget(self) -> None:
        """Let go of the batch."""
        self.inputs, self.differentiated = {}, {}

    def run_node(self, node: Node) -> Any:
        """One node; a watched one's input and output are kept."""
        if node not in self.watched:
            return super().run_node(node)
        arguments, _ = self.fetch_args_kwargs_from_env(node)
        self.inputs[node] = tuple(arguments)
        result = super().run_node(node)
        if torch.is_grad_enabled() and not result.requires_grad:
            # Computed from constants only, as an attention pool's query is; its error still moves the output.
            result = result.requires_grad_()
        role = annotation_of(node).role
        self.differentiated[node] = arguments[0] if role in (Role.SOFTMAX, Role.LAYER_NORM) else result
        return result
