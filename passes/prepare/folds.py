"""What passes that fold leave behind: the fact FOLDED, and the note of which of them have run.

To fold is to move a factor, a shift or a rotation out of an activation and into norms and weights, so that the graph
computes the same with tensors that are easier to quantize (FoldSqb, RotateResidual, BalanceHeads).
"""

from __future__ import annotations

from torch.fx import GraphModule

from fxquant.checks.finite import is_finite
from fxquant.graph.annotation import nodes_with_role
from fxquant.graph.facts import Fact, broken_at, missing
from fxquant.graph.notes import Note

FOLDS: Note[list[str]] = Note("folds", list)
"""Names of the passes that have folded something into norms and weights, in the order they ran."""


def note_fold(graph_module: GraphModule, name: str) -> None:
    """Record that a pass of this name has folded what it can; the check of FOLDED asks for it."""
    FOLDS.write(graph_module, [*(FOLDS.get(graph_module) or []), name])


def _check_folded(graph_module: GraphModule) -> None:
    """A pass that folds has run, and parameters have stayed finite through it."""
    if not FOLDS.get(graph_module):
        raise missing("no pass has folded anything", "FoldSqb, RotateResidual or BalanceHeads")
    for node in nodes_with_role(graph_module):
        if node.op != "call_module":
            continue
        for name, parameter in graph_module.get_submodule(str(node.target)).named_parameters():
            if not is_finite(parameter):
                raise broken_at(node, f"'{name}' is not finite", "calibrate on images with finite outputs")


FOLDED = Fact("folded", _check_folded)
"""A pass that folds has run, and norms and weights are finite."""
