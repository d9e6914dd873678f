"""Nuclear norms of attention maps and MLP outputs: how much information a module's feature holds (VT-PTQ).

    ||Y||_* = sum_j sigma_j(Y)    Y: the attention map (N, N) of one head for MSA, the output (N, C) of fc2 for MLP

Liu et al., "Post-Training Quantization for Vision Transformer" (2021), section 3.3: modules whose features have a large
nuclear norm are taken to be sensitive. Means over images, and over heads (and windows) of an attention.
Deliberately not done: bringing the two kinds of modules to one scale; that they differ is LampQ's point.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.errors import SensitivityError
from fxquant.graph.annotation import Role, annotation_of, nodes_with_role
from fxquant.sensitivity.sums import Sums


class Module(StrEnum):
    """The two halves of a transformer block."""

    MSA = "msa"
    MLP = "mlp"


MODULE_OF = {Role.QKV: Module.MSA, Role.PROJ: Module.MSA, Role.FC1: Module.MLP, Role.FC2: Module.MLP}
"""The module a layer belongs to."""

_FEATURE_OF = {Role.SOFTMAX: Module.MSA, Role.FC2: Module.MLP}


def nuclear_norms(
    graph_module: GraphModule, batches: Iterable[Tensor], sums: Sums | None = None
) -> dict[tuple[int, Module], float]:
    """Mean nuclear norm by (block, module).

    Args:
        graph_module: a traced graph whose nodes have roles.
        batches: images, float (B, C, H, W).
        sums: what the batches before these have added up to.

    Raises SensitivityError for a feature that is not finite.
    """
    sums = Sums() if sums is None else sums
    runner = _Norms(graph_module, sums)
    with torch.no_grad():
        for batch in batches:
            runner.run(batch)
    found = {key: sums[f"{key} total"] / sums[f"{key} count"] for key in map(_key, runner.watched)}
    for (block, module), norm in found.items():
        if not norm < float("inf"):
            raise SensitivityError(f"the feature of {module} in block {block} is not finite")
    return found


def nuclear_norm(matrices_nm: Tensor) -> Tensor:
    """Sum of singular values of each matrix, float64: (..., N, M) to (...)."""
    values: Tensor = torch.linalg.svdvals(matrices_nm)
    return values.sum(-1, dtype=torch.float64)


class _Norms(Interpreter):
    """Adds up nuclear norms while the graph runs; keeps no feature."""

    def __init__(self, graph_module: GraphModule, sums: Sums) -> None:
        super().__init__(graph_module)
        watched = nodes_with_role(graph_module, *_FEATURE_OF)
        self.watched = [node for node in watched if annotation_of(node).block is not None]
        self.sums = sums

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node in self.watched:
            norms = nuclear_norm(result)
            self.sums.add(f"{_key(node)} total", float(norms.sum()))
            self.sums.add(f"{_key(node)} count", norms.numel())
        return result


def _key(node: Node) -> tuple[int, Module]:
    """Block and module of a node that is watched."""
    annotation = annotation_of(node)
    if annotation.block is None or annotation.role is None:
        raise SensitivityError(f"{node.name} is in no block")
    return annotation.block, _FEATURE_OF[annotation.role]
