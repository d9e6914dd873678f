"""Accuracy of every method at every width, both protocols: the paper's Tables 1, 2, 3, 5, 6 and supplementary Table 1.

    python benchmarks/accuracy.py embedded
    python benchmarks/accuracy.py vit_tiny_patch16_224 --weights W.safetensors --calibration C.npz --test T.npz
    python benchmarks/accuracy.py ... --images 1024 --methods best_thorough --protocol float-norms --bits 4,3

The .npz files hold uint8 `images` (N, H, W, 3) of the model's size and, for the test, `labels` (N,). Results go to
benchmarks/results/accuracy_MODEL.json after every row, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allocators.greedy import Greedy
from allocators.milp import Milp
from allocators.problem.budget import Budget
from allocators.uniform import Uniform
from fxquant.artefact.cache import signature
from fxquant.data import embedded
from fxquant.data.models import load_model
from fxquant.graph.annotation import Role
from fxquant.graph.capture.tracing import trace
from fxquant.session.session import Session
from fxquant.session.sweep import Results
from passes.allocate.allocate_bits import AllocateBits
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.prepare.fold_sqb import FoldSqb
from passes.search.calibrate import Calibrate
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers

RESULTS = Path(__file__).parent / "results"
OS_PLUS = FoldSqb(eps="outlier-suppression+", mu="midrange")

# Row: recipe, its options, and the allocators that share its calibration.
METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("naive_min_max", {}, {"naive min-max": Uniform()}),
    (
        "tsptq_vit",
        {},
        {"TSPTQ (baseline)": Uniform(), "Greedy MP": Greedy(), "Greedy MP, SQNR only": Greedy(metric="sqnr")},
    ),
    ("tsptq_vit", {"fold": FoldSqb(mu="none")}, {"+ SQ": Uniform()}),
    ("tsptq_vit", {"fold": FoldSqb()}, {"+ SQ-b": Uniform()}),
    ("tsptq_vit", {"fold": FoldSqb(mu="midrange")}, {"+ SQ-b with mu of OS+": Uniform()}),
    (
        "mptq_vit",
        {},
        {"+ SQ-b + OPT-m": Uniform(), "MPTQ-ViT (Greedy MP)": Greedy(), "MPTQ-ViT with MILP": Milp()},
    ),
    ("best", {}, {"best": Milp()}),
    ("best_thorough", {}, {"best_thorough": Milp()}),
]
THOROUGH_IMAGES = 512  # of calibration; fewer are too few for best_thorough


def points(bits: list[int]) -> Iterator[tuple[bool, str, dict[str, Any], int, dict[str, Any]]]:
    """(fully quantized, recipe, options, bits, allocators) of the whole table."""
    for full in (False, True):
        for recipe, options, allocators in METHODS:
            for width in bits:
                yield full, recipe, options, width, allocators


def top1(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 20) -> float:
    """Percent correct on preprocessed images (N, C, H, W)."""
    with torch.inference_mode():
        pairs = zip(images.split(batch), labels.split(batch), strict=True)
        return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(labels)


def fc1_inputs(model: nn.Module, calibration: Tensor, bits: int, fold: FoldSqb) -> nn.Module:
    """Table 6: only the inputs of fc1 quantized, min-max scales."""
    plan = PlanOperands(image=None, weight=None, roles=(Role.FC1,))
    allocate = AllocateBits(Budget(mean_activation_bits=bits), Uniform())
    search = SearchScales(criterion="min-max")
    steps = [AssignRoles(), plan, fold, InsertObservers(), Calibrate(gradient=False)]
    steps += [search, allocate, SubstituteQuantizers()]
    return Pipeline(steps).run(trace(model, calibration[:2]), PassContext(calibration))


def main() -> None:
    """Measure what is missing and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", default="8,6,5,4,3")
    parser.add_argument("--protocol", choices=("both", "float-norms", "fully-quantized"), default="both")
    parser.add_argument("--methods", default="", help="only rows whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="folder for what long steps keep, so that they go on after a stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model, calibration, images, labels = load(options)
    results = Results(RESULTS / f"accuracy_{options.model}.json")
    settings = signature(model, calibration, len(images))
    shared = {"test_images": len(labels), "calibration_images": len(calibration), "seed": 0}
    results.point(
        signature(settings, "float"), lambda: {"method": "float", "top1": top1(model, images, labels), **shared}
    )
    sessions: dict[str, Session] = {}
    for full, recipe, extra, width, allocators in points([int(b) for b in options.bits.split(",")]):
        for method, allocator in allocators.items():
            if options.methods not in method or options.protocol == ("float-norms" if full else "fully-quantized"):
                continue
            if method == "best_thorough" and len(calibration) < THOROUGH_IMAGES:
                continue
            key = signature(settings, method, full, width)
            if key in results.points:
                continue
            group = f"{recipe} {extra} {full}"
            if group not in sessions:
                sessions.clear()
                sessions[group] = Session(
                    model, calibration, recipe=recipe, cache=options.cache, fully_quantized=full, **extra
                )
            start = time.perf_counter()
            compiled = sessions[group].compile(f"W{width}A{width}", allocator)
            seconds = time.perf_counter() - start
            lowered = compiled.lowered("auto")
            usage = compiled.allocation.usage if compiled.allocation else {}
            point = {
                "method": method,
                "fully_quantized": full,
                "bits": width,
                "top1": top1(lowered, images, labels),
                "execution": str(lowered.card["execution"]),
                "usage": usage,
                "predicted_loss": compiled.allocation.objective if compiled.allocation else None,
                "seconds": sum(entry.seconds for entry in compiled.journal.entries),
                "seconds_here": seconds,
                **shared,
            }
            results.point(key, lambda point=point: point)
            print(json.dumps(point), flush=True)
    for width in (6, 4):
        for method, fold in (("fc1 inputs, eps of OS+", OS_PLUS), ("fc1 inputs, eps of SQ-b", FoldSqb(mu="midrange"))):
            key = signature(settings, method, width)
            if key not in results.points and options.methods in method:
                fold = FoldSqb(eps=fold.eps, mu=fold.mu, search_bits=width)
                accuracy = top1(fc1_inputs(model, calibration, width, fold), images, labels)
                point = {"method": method, "fully_quantized": False, "bits": width, "top1": accuracy, **shared}
                results.point(key, lambda point=point: point)
                print(json.dumps(point), flush=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that `load` reads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--images", type=int, default=32, help="calibration images")
    parser.add_argument("--limit", type=int, default=2000, help="test images")
    return parser


def load(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The model, calibration images, test images and labels that the options name, preprocessed."""
    if options.model == "embedded":
        return embedded.load_model(), embedded.calibration_images(options.images), *embedded.test_images(options.limit)
    test = np.load(options.test)
    labels = torch.from_numpy(test["labels"][: options.limit].astype(np.int64))
    given = np.load(options.calibration)
    classes = 1 + max(int(data["labels"].max()) for data in (test, given) if "labels" in data)
    named = load_model(options.model, options.weights, num_classes=classes)
    mean, std = named.preprocessing.mean, named.preprocessing.std
    calibration = normalized(given["images"][: options.images], mean, std)
    return named.model, calibration, normalized(test["images"][: options.limit], mean, std), labels


def normalized(images_nhwc: np.ndarray, mean: Any, std: Any) -> Tensor:
    """uint8 (N, H, W, 3) to the model's float (N, 3, H, W)."""
    x = torch.from_numpy(images_nhwc).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


if __name__ == "__main__":
    main()
