"""A user's script, which `mypy` checks strictly with the packages: what the package gives away has types."""

from __future__ import annotations

import torch

import fxquant
from fxquant import Budget, Compiled, Session


def compiled(model: torch.nn.Module, images: torch.Tensor) -> Compiled:
    """Compile, save, load and report. The misspelt option is found: mypy tells an ignore in vain."""
    session = Session(model, images, recipe="best", overrides={"head": 8}, progress=False)
    first: Compiled = session.compile(Budget.parse("W4A4"))
    first.save("model.fxq")
    again: Compiled = fxquant.load("model.fxq", backend="auto")
    report: str = str(again.report())
    print(report, first.allocation)
    fxquant.compile(model, "W4A4", calibration=images, sede=1)  # type: ignore[call-arg]
    return fxquant.compile(model, "W4A4", calibration=images, seed=1, fully_quantized=True)
