"""A user's script, which `mypy` and pyright check strictly: what the package gives away has types.

The misspelt option is found: an ignore in vain is an error to mypy, and tests/session/test_user_script.py takes it away
for pyright.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch.fx import GraphModule

import fxquant
from allocators.greedy import Greedy
from fxquant import Budget, Compiled, PassContext, Pipeline, Session, Synthesis
from fxquant.graph.facts import TRACED, Fact
from passes.correct.distil import Distil
from passes.prepare.assign_roles import AssignRoles
from passes.recipes import recipe
from passes.recipes.lampq import lampq


@dataclass(frozen=True)
class Nothing:
    """A pass of the user's."""

    times: int = 1

    requires: ClassVar[frozenset[Fact]] = frozenset({TRACED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Change nothing."""
        return 0


def compiled(model: torch.nn.Module, images: torch.Tensor) -> Compiled:
    """Compile, save, load and report."""
    session = Session(model, images, recipe="best", overrides={"head": 8}, bits=(3, 4), progress=False)
    first: Compiled = session.compile(Budget.parse("W4A4"), Greedy())
    first.save("model.fxq")
    again: Compiled = fxquant.load("model.fxq", backend="auto").eval().to("cpu")
    report: str = str(again.report())
    bits: list[int | None] = [row.weight_bits for row in again.layers]
    seconds: float = sum(entry.seconds for entry in again.journal.entries)
    print(report, first.allocation, bits, seconds, again.report().totals.model_bytes)
    fxquant.compile(model, "W4A4", calibration=images, sede=1)  # type: ignore[call-arg]
    return fxquant.compile(model, "W4A4", calibration=images, seed=1, fully_quantized=True)


def composed(model: torch.nn.Module, images: torch.Tensor) -> GraphModule:
    """Compose pipelines, give recipes with options."""
    pipeline = Pipeline([AssignRoles(), Nothing(times=2)]).after(Nothing, Nothing())
    longer = recipe("best_thorough")("W4A4").changed(Distil, steps=600)
    fxquant.compile(model, None, calibration=images, recipe=longer)
    fxquant.compile(model, {"mean_weight_bits": 4}, calibration=[images, images], recipe=partial(lampq, update=None))
    return pipeline.run(fxquant.trace(model, images[:2]), PassContext(images))


def measured(model: torch.nn.Module) -> tuple[torch.Tensor, list[float]]:
    """Make images, and ask what budgets are worth."""
    images = fxquant.synthesize(model, Synthesis(count=4), progress=False)
    found = fxquant.frontier(model, images, limits=[3, 4], realised="divergence", objective="classes")
    exported: dict[str, str] = compiled(model, images).export_onnx("model.onnx", check=True)
    print(found, exported, compiled(model, images).to_networkx().number_of_nodes())
    return images, [point.loss for point in found.points]
