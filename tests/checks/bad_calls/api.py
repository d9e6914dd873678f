"""compile, Session, frontier, synthesize, trace; recipes; pipelines and how they are edited."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fxquant
from allocators.greedy import Greedy
from allocators.problem.budget import Budget
from allocators.uniform import Uniform
from fxquant.session.session import Session
from fxquant.synthesis.pictures import Synthesis
from fxquant.synthesis.synthesize import synthesize
from passes.allocate.measure_latency import MeasureLatency
from passes.pipeline.pipeline import Pipeline
from passes.pipeline.progress import SilentProgress
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes import RECIPES
from passes.search.calibrate import Calibrate
from tests.checks.bad_calls.generator import ANYTHING, WRONG_SIZE, Endless, Entry, Good, Make, is_budget, unfit


def endless() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["itself"] = found
    return found


def _shared(good: Good) -> dict[str, tuple[Make, list[Any]]]:
    """Arguments that many entry points have: a valid value, and bad ones."""
    strange = torch.full((2, 3, 16, 16), math.nan)
    bad_images: list[Any] = [
        torch.zeros(0, 3, 16, 16), torch.zeros(2, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), strange,
        torch.zeros(2, 3, 16, 16).to("meta"), torch.zeros(2, 3, 16, 16).to_sparse(), torch.zeros(2, 3, 0, 16),
        torch.zeros(2, 3, 16, 16, dtype=torch.complex64), good.images.numpy(), list(good.images), [good.images],
    ]  # fmt: skip
    no_images = [value for value in ANYTHING if value is not None]
    models = [nn.ReLU(), nn.Linear, good.compiled, good.model.state_dict(), "vit_tiny_patch16_224"]
    pathless = [value for value in ANYTHING if not isinstance(value, str | Path) and value is not None]
    return {
        "model": (lambda: good.model, [*unfit(nn.Module), *models]),
        "budget": (lambda: "W4A4", [
            "W", "W4W4", "0MB", "-3", "MP0", "MP" + "9" * 5000, "W1A1", "1B", "5ms", "4 potatoes", "W4A4, 5ms", "²MB",
            {"mean_weight_bits": "4"}, {"bits": 4}, {"weight_bytes": -1}, {1: 4}, {"mean_weight_bits": None},
            *[value for value in ANYTHING if not is_budget(value)],
        ]),
        "calibration": (lambda: good.images, [*no_images, *bad_images]),
        "images": (lambda: good.images, [*no_images, *bad_images]),
        "recipe": (lambda: "naive_min_max", [*unfit(str), "x", "", "BEST", Pipeline([]), RECIPES["best"]]),
        "allocator": (Uniform, ["greedy", Greedy, *[value for value in ANYTHING if value is not None]]),
        "overrides": (dict, [
            {"head": 11}, {"head": "8"}, {"head": (8,)}, {"head": True}, {"nothing": 8}, {3: 8}, {"head": (8, 8, 8)},
            {"head": None}, {"head": 2.5}, [("head", 8)], *unfit(Mapping[str, int], but=(None,)),
        ]),
        "first_last_bits": (lambda: 8, [1, 9, 0, "8", True, *unfit(int | None)]),
        "fully_quantized": (lambda: False, [0, 1, *unfit(bool)]),
        "backend": (lambda: "simulated", ["gpu", "", "CUDA", *unfit(str)]),
        "latency": (MeasureLatency, [MeasureLatency, *[value for value in ANYTHING if value is not None]]),
        "seed": (lambda: 0, ["0", -1, 2**32, True, *unfit(int)]),
        "batch_size": (lambda: 2, ["2", 0, -1, 2**63, True, *unfit(int)]),
        "progress": (
            SilentProgress,
            [Endless(), SilentProgress, *[v for v in ANYTHING if v is not None and v is not True]],
        ),
        "cache": (lambda: str(good.folder / "cache"), [
            "", "a\0b", str(good.folder / "good.npz" / "below"), *pathless,
        ]),
        "card": (dict, [
            {"a": {1, 2}}, {"a": math.nan}, {"a": good.images}, {"a": {1: 2}}, endless(), {1: 2},
            *[value for value in ANYTHING if value is not None and not isinstance(value, dict)],
        ]),
    }  # fmt: skip


def _entry(name: str, function: Callable[..., Any], arguments: Mapping[str, tuple[Make, Sequence[Any]]]) -> Entry:
    valid = {name: pair[0] for name, pair in arguments.items()}
    return Entry(name, function, valid, {name: pair[1] for name, pair in arguments.items() if pair[1]})


def one_call(good: Good) -> list[Entry]:
    """compile, Session and its methods, frontier, synthesize, trace."""
    shared = _shared(good)

    def of(*names: str) -> dict[str, tuple[Make, list[Any]]]:
        return {name: shared[name] for name in names}

    common = of("model", "calibration", "recipe", "seed", "batch_size", "progress", "cache")
    options = of("first_last_bits", "fully_quantized", "backend", "overrides")
    point = of("budget", "allocator")
    limits = [[], "34", [0], ["x"], [math.nan], [True], 3, {3: 4}, [1.0], np.zeros((2, 2)), [10**400]]
    axis = ["bits", "", "latency_ms", *unfit(str)]
    synthesis = [value for value in ANYTHING if not isinstance(value, Synthesis)]
    shares = ["0.5", -0.1, 1.5, math.nan, *unfit(float)]
    unread = [value for value in shared["budget"][1] if not is_budget(value)]
    example = [value for value in shared["calibration"][1] if value is not None]
    # Session looks at images and at names of layers when it is first asked for something.
    later = ({"head": 11}, {"nothing": 8}, {"head": (8, 8, 8)})
    overrides = [value for value in shared["overrides"][1] if not isinstance(value, dict) or value not in later]
    lazy = of("model", "recipe", "seed", "batch_size", "progress", "cache", "card")
    lazy["calibration"] = (
        lambda: good.images,
        [value for value in shared["calibration"][1] if value is not WRONG_SIZE],
    )
    session = lazy | options | {"overrides": (dict, overrides)}
    return [
        _entry("compile", fxquant.compile, common | options | of("budget", "allocator", "latency", "card")),
        _entry("Session", Session, session),
        _entry("Session.compile", good.session.compile, point),
        _entry("Session.check", good.session.check, point),
        _entry("Session.cost_table", good.session.cost_table, {
            "budget": (lambda: "W4A4", [value for value in shared["budget"][1] if not isinstance(value, str)]),
            "lowest": (lambda: None, [value for value in ANYTHING if value is not None]),
        }),
        _entry("frontier", fxquant.frontier, common | {
            "axis": (lambda: "mean_bits", axis), "limits": (lambda: [4.0], limits),
            "exact": (lambda: False, [0, *unfit(bool)]), "realised": (lambda: None, ["loss", 3, [len], True]),
            "images": (lambda: None, [value for value in shared["images"][1] if value is not WRONG_SIZE]),
        }),
        _entry("synthesize", synthesize, of("model", "seed", "batch_size", "progress", "cache") | {
            "options": (lambda: Synthesis(1, 1), synthesis)
        }),
        _entry("trace", fxquant.trace, of("model") | {
            "example_bchw": (lambda: good.images, example), "minimum_coverage": (lambda: 0.9, shares),
        }),
        _entry("Budget.parse", Budget.parse, {"value": (lambda: 4, unread)}),
    ]  # fmt: skip


def recipes() -> list[Entry]:
    """Every recipe by its own name."""
    tables: dict[str, Sequence[Any]] = {
        "fully_quantized": [0, *unfit(bool)], "fold": [FoldSqb, "none", *[v for v in ANYTHING if v is not None]],
        "bits": [(9,), (4, 3), (), (4, 4), ("4",), 4, "4", [2.5], (1, 4)], "backend": ["gpu", *unfit(str)],
        "first_last_bits": [1, 9, "8", True], "overrides": [{"head": "8"}, [("head", 8)], {3: 8}, 3],
        "latency": [3, "x", MeasureLatency], "allocator": ["greedy", Greedy, 3], "nonsense": [1, None],
        "budget": ["W", "", b"x", [], {}, True, -1, math.nan],
    }  # fmt: skip
    return [Entry(name, recipe, {"budget": lambda: "W4A4"}, tables) for name, recipe in RECIPES.items()]


def pipelines() -> list[Entry]:
    """Building and editing pipelines."""
    pipeline = RECIPES["naive_min_max"]("W4A4")
    kinds = [value for value in ANYTHING if not isinstance(value, type)] + [int, FoldSqb, Calibrate()]
    news = [Calibrate, *ANYTHING]
    return [
        Entry("Pipeline", Pipeline, {"passes": list}, {
            "passes": [3, None, "x", [3], [Calibrate], Calibrate(), [Calibrate()], {"a": 1}],
            "assumes": [3, None, ["x"], "traced", [3]],
        }),
        Entry("Pipeline.position", pipeline.position, {}, {"kind": kinds}),
        Entry("Pipeline.without", pipeline.without, {}, {"kind": kinds}),
        Entry("Pipeline.replace", pipeline.replace, {"kind": lambda: Calibrate, "new": Calibrate},
              {"kind": kinds, "new": news}),
        Entry("Pipeline.changed", lambda **given: pipeline.changed(**given), {"kind": lambda: Calibrate},
              {"kind": kinds, "draws": ["x", 0, 2.5, None], "typo": [1]}),
        Entry("Pipeline[]", pipeline.__getitem__, {}, {"index": ["x", 99, -99, 2.5, None, True, (1, 2), []]}),
        Entry("Pipeline.run", pipeline.run, {}, {"graph_module": [*ANYTHING, nn.ReLU()], "context": [3, None, {}]}),
    ]  # fmt: skip
