"""What a stranger's file is put through: loaded, reported, drawn, run, lowered and run again."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxquant
from fxquant.artefact import artefact
from fxquant.commands.inspect_artefact import report_of
from fxquant.errors import FxQuantError
from fxquant.graph.printer import format_graph
from fxquant.report.tables import Report


@dataclass(frozen=True)
class Outcome:
    """stage: how far the use came. error: the class of the error that ended it, "" for none. is_typed: of ours.

    message: its text, and where it was raised. cpu_s: CPU seconds.
    """

    stage: str
    error: str
    is_typed: bool
    message: str
    cpu_s: float


def use(path: Path, image_shape: tuple[int, ...]) -> list[Outcome]:
    """Load, report, inspect, one forward on two images, lower, one forward of that: what ended each, if anything."""
    images = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    reports: list[Report] = []
    loaded: list[fxquant.Compiled] = []
    lowered: list[fxquant.Compiled] = []
    stages: dict[str, Callable[[], Any]] = {
        "card": lambda: artefact.inspect_card(path),
        "sizes": lambda: artefact.size_breakdown(path),
        "inspect": lambda: reports.append(report_of(path)),
        "text": lambda: [(str(r), json.dumps(r.to_dict())) for r in reports],
        "page": lambda: [r.to_html() for r in reports],
        "load": lambda: loaded.append(fxquant.load(path)),
        "report": lambda: [(str(c.report()), json.dumps(c.report().to_dict())) for c in loaded],
        "graph": lambda: [(format_graph(c.graph_module), c.to_networkx()) for c in loaded],
        "forward": lambda: [_forward(c, images) for c in loaded],
        "lower": lambda: lowered.extend(c.lowered("auto") for c in loaded),
        "lowered forward": lambda: [_forward(c, images) for c in lowered],
    }
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stage, action in stages.items():
            began = time.process_time()
            error: BaseException | None = None
            try:
                action()
            except Exception as caught:
                error = caught
            found.append(_outcome(stage, error, time.process_time() - began))
    return found


def _forward(model: fxquant.Compiled, images: Tensor) -> None:
    kept = images.clone()
    with torch.inference_mode():
        scores = model(images)
    if not torch.equal(images, kept):
        raise RuntimeError("the caller's images were changed")
    if not isinstance(scores, Tensor):
        raise RuntimeError("the scores are no tensor")


def _outcome(stage: str, error: BaseException | None, cpu_s: float) -> Outcome:
    if error is None:
        return Outcome(stage, "", True, "", cpu_s)
    place = error.__traceback__
    frames = []
    while place is not None:
        frames.append(f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}")
        place = place.tb_next
    is_typed = isinstance(error, FxQuantError)
    return Outcome(stage, type(error).__name__, is_typed, f"{str(error)[:300]} [{' '.join(frames[-4:])}]", cpu_s)
