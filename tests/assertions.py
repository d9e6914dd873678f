"""What a test of a pass says in a line: this graph becomes that text; these two compute the same."""

from __future__ import annotations

import copy
import textwrap

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.printer import format_graph
from passes.pipeline.contract import Pass, PassContext


def assert_rewrites(
    before: GraphModule, step: Pass, after: str, context: PassContext | None = None, *, is_idempotent: bool = True
) -> int:
    """The pass changes the graph into this text, and a second time changes nothing of it. Returns its count of nodes.

    Args:
        before: changed in place.
        step: the pass.
        after: lines of `format_graph` that follow one another in what the pass leaves; indentation does not count.
        context: what the pass is given; nothing by default.
        is_idempotent: False for a pass whose docstring says that it is not.
    """
    context = PassContext() if context is None else context
    changed = step.apply(before, context)
    before.graph.lint()
    text = format_graph(before)
    assert textwrap.dedent(after).strip("\n") in text, f"{step} has left\n{text}"
    if is_idempotent:
        step.apply(before, context)
        assert format_graph(before) == text, f"{step} for a second time"
    return changed


def exact(model: nn.Module, images_bchw: Tensor) -> Tensor:
    """What the model computes in float64, which float32 and integers approximate; (B, classes) as a rule."""
    with torch.inference_mode():
        scores: Tensor = copy.deepcopy(model).double()(images_bchw.double())
    return scores


def assert_same_function(before: nn.Module, after: nn.Module, images_bchw: Tensor, tolerance: float = 1e-9) -> None:
    """Both compute the same in float64, up to `tolerance` of the largest value."""
    expected, found = exact(before, images_bchw), exact(after, images_bchw)
    off, largest = float((found - expected).abs().max()), float(expected.abs().max())
    assert off <= tolerance * max(1.0, largest), f"off by {off:.3g}, of values up to {largest:.3g}"
