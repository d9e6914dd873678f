"""LampQ's Tables 3 and 6 here: uniform bits, VT-PTQ, and LampQ with each idea in turn, on the same quantizers.

    python benchmarks/lampq.py embedded
    python benchmarks/lampq.py vit_tiny_patch16_224 --weights W.safetensors --calibration C.npz --test T.npz

Seeds are different slices of the calibration file: seed s calibrates on images 32 s to 32 s + 31 and draws with seed s.
The .npz files are those of benchmarks/accuracy.py. Every row keeps both means, of weights (by parameters) and of inputs
(by elements), at or below the budget's; what is outside the four layers of a block has exactly these bits. Where the
two means differ, a layer's weights and inputs are not tied. Results go to benchmarks/results/lampq_MODEL.json after
every row, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import RESULTS, arguments, load
from torch import Tensor, nn

from allocators.problem.budget import Budget
from allocators.uniform import Uniform
from fxquant.artefact.cache import signature
from fxquant.session.session import Session
from fxquant.session.sweep import Results
from passes.allocate.metrics import NuclearNorm, PredictedLoss
from passes.allocate.update_bits import PAPERS_UPDATE, UpdateBits
from passes.recipes import RECIPES

MEANS = ("mean_weight_bits", "mean_activation_bits")

# Row: recipe, its options (a base by name). Rows with a recipe that is not there are left out.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "{base} uniform": ("{base}", {"allocator": Uniform()}),
    "RepQ-ViT uniform": ("repq_vit", {"allocator": Uniform()}),
    "+ VT-PTQ": ("vt_ptq", {"base": "{base}"}),
    "+ I1, nuclear norm": ("lampq", {"base": "{base}", "metric": NuclearNorm(), "update": None}),
    "+ I1, Fisher": ("lampq", {"base": "{base}", "type_aware": False, "update": None}),
    "+ I1 + I2": ("lampq", {"base": "{base}", "update": None}),
    "+ I1 + I3, nuclear norm": ("lampq", {"base": "{base}", "metric": NuclearNorm()}),
    "+ I1 + I3, Fisher": ("lampq", {"base": "{base}", "type_aware": False}),
    "LampQ": ("lampq", {"base": "{base}"}),
    "LampQ, weighted update": ("lampq", {"base": "{base}", "update": UpdateBits(weighted=True)}),
    "LampQ, paper's update": (
        "lampq",
        {"base": "{base}", "update": PAPERS_UPDATE},
    ),
    "predicted loss, tied": ("lampq", {"base": "{base}", "metric": PredictedLoss(), "update": None}),
    "predicted loss, tied + I3": ("lampq", {"base": "{base}", "metric": PredictedLoss()}),
    "RepQ-ViT + LampQ": ("lampq", {"base": "repq_vit"}),
}


def resolved(name: str, base: str) -> tuple[str, dict[str, Any]] | None:
    """Recipe and options of a row, bases as functions; None where a recipe is missing."""
    recipe, options = ROWS[name]
    recipe = recipe.format(base=base)
    found = dict(options)
    if "base" in found:
        found["base"] = str(found["base"]).format(base=base)
    if {recipe, found.get("base", recipe)} - set(RECIPES):
        return None
    if "base" in found:
        found["base"] = RECIPES[found["base"]]
    return recipe, found


def outputs(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Logits, float64 (N, classes)."""
    with torch.inference_mode():
        return torch.cat([model(x).double() for x in images.split(20)])


def measured(exact: Tensor, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 in percent, and the divergence from the float model's logits `exact` in nats per image."""
    log_p, log_q = exact.log_softmax(1), logits.log_softmax(1)
    return {
        "top1": 100 * float((logits.argmax(1) == labels).double().mean()),
        "divergence": float((log_p.exp() * (log_p - log_q)).sum(1).mean()),
    }


def point(
    name: str,
    base: str,
    budget: str,
    seed: int,
    model: nn.Module,
    calibration: Tensor,
    images: Tensor,
    labels: Tensor,
    exact: Tensor,
    cache: Path | None = None,
) -> dict[str, Any] | None:
    """One row: a whole compile and its accuracy."""
    row = resolved(name, base)
    if row is None:
        return None
    recipe, options = row
    allocator = options.pop("allocator", None)
    start = time.perf_counter()
    quantized = Session(model, calibration, recipe=partial(RECIPES[recipe], **options), seed=seed, cache=cache).compile(
        budget, allocator
    )
    seconds = time.perf_counter() - start
    notes = {entry.step.split("(")[0]: entry for entry in quantized.journal.entries}
    own = {step: notes[step].seconds for step in ("ScoreLayers", "AllocateBits", "UpdateBits") if step in notes}
    update = notes["UpdateBits"].notes if "UpdateBits" in notes else {}
    assert quantized.allocation is not None
    return {
        "method": name.format(base=base),
        "budget": budget,
        "seed": seed,
        **measured(exact, outputs(quantized, images), labels),
        "usage": quantized.allocation.usage,
        "seconds": seconds,
        "allocation_seconds": own,
        "exchanges_kept": sum(entry["kept"] for entry in update.get("trajectory", [])),
        "score": [update.get("score_before"), update.get("score_after")],
        "test_images": len(labels),
        "calibration_images": len(calibration),
    }


def table(points: list[dict[str, Any]]) -> list[str]:
    """Mean and spread (standard deviation over seeds) of the top-1, rows methods, columns budgets."""
    points = [p for p in points if "budget" in p]
    budgets = sorted({p["budget"] for p in points})
    heads = " | ".join(budgets)
    lines = [f"| method | {heads} | mean W, A bits beyond | allocation s |", "|---" * (len(budgets) + 3) + "|"]
    for method in dict.fromkeys(p["method"] for p in points):
        mine = [p for p in points if p["method"] == method]
        cells = []
        for budget in budgets:
            top1 = [p["top1"] for p in mine if p["budget"] == budget]
            spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
            cells.append(f"{statistics.mean(top1):.1f}{spread}" if top1 else "-")
        means = ", ".join(
            f"{low:+.2f} to {high:+.2f}" for low, high in (extremes(mine, quantity) for quantity in MEANS)
        )
        seconds = statistics.mean(sum(p["allocation_seconds"].values()) for p in mine)
        lines.append(f"| {method} | {' | '.join(cells)} | {means} | {seconds:.1f} |")
    return lines


def extremes(points: list[dict[str, Any]], quantity: str) -> tuple[float, float]:
    """Least and largest of what a quantity of `Budget` came to, less what the budget allows."""
    beyond = [p["usage"][quantity] - getattr(Budget.parse(p["budget"]), quantity) for p in points]
    return min(beyond), max(beyond)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = arguments(__doc__)
    parser.set_defaults(limit=1000)
    parser.add_argument("--base", default="adalog" if "adalog" in RECIPES else "mptq_vit", help="recipe of all rows")
    parser.add_argument("--budgets", default="W3A3,W3A4,W4A4,W6A6")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="", help="only these rows, separated by ;")
    parser.add_argument("--cache", type=Path, help="folder that keeps calibrated models, which rows share")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, calibrations, images, labels = loaded(options)
    results = Results(RESULTS / f"lampq_{options.model}.json")
    settings = signature(model, len(images), options.images)
    exact = outputs(model, images)
    row = {"method": "float", **measured(exact, exact, labels), "test_images": len(labels)}
    results.point(signature(settings, "float"), lambda: row)
    for seed in range(options.seeds):
        for budget in options.budgets.split(","):
            for name in [n for n in ROWS if not options.rows or n in options.rows.split(";")]:
                key = signature(settings, name.format(base=options.base), options.base, budget, seed)
                if key in results.points:
                    continue
                found = point(
                    name, options.base, budget, seed, model, calibrations(seed), images, labels, exact, options.cache
                )
                if found is None:
                    print(f"left out, a recipe is missing: {name.format(base=options.base)}", flush=True)
                    continue
                results.point(key, lambda found=found: found)
                print(json.dumps(found), flush=True)
    print("\n".join(table([p for p in results.points.values() if p["test_images"] == len(images)])))


def loaded(options: argparse.Namespace) -> tuple[nn.Module, Callable[[int], Tensor], Tensor, Tensor]:
    """The model, calibration images by seed, test images and labels."""
    count, wanted = options.images, options.images * options.seeds
    model, calibration, images, labels = load(argparse.Namespace(**{**vars(options), "images": wanted}))
    if len(calibration) < wanted:
        raise SystemExit(f"{len(calibration)} calibration images, {wanted} needed")
    return model, lambda seed: calibration[count * seed : count * (seed + 1)], images, labels


if __name__ == "__main__":
    main()
