"""What correcting, compensating and reconstructing weights is worth: accuracy and divergence from the float model.

    python benchmarks/reconstruction.py embedded --images 512
    python benchmarks/reconstruction.py vit_tiny_patch16_224 --weights W.safetensors --calibration C.npz --test T.npz

Scales are searched and bits allocated once per budget by a recipe, with 32 images; each row starts from a copy.
Beside top-1 on the test images: the mean KL divergence from the float model, in nats per image, on images the pass has
seen (`fit_kl`), on test images (`test_kl`), and the pass' seconds. Results go to
benchmarks/results/reconstruction_MODEL.json after every row, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from accuracy import RESULTS, arguments, load
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.artefact.cache import signature
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import facts_of
from fxquant.session.sweep import Results
from passes.allocate.allocate_bits import AllocateBits
from passes.correct.compensate_weights import CompensateWeights
from passes.correct.correct_weights import CorrectWeights
from passes.correct.distil import Distil
from passes.correct.reconstruct import Reconstruct
from passes.pipeline.contract import Pass, PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import recipe
from passes.search.augment import Augment
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers

SEARCH_IMAGES = 32

METHODS: list[tuple[str, int, tuple[Pass, ...]]] = [
    ("none", 32, ()),
    ("GPTQ, Fisher Gram", 32, (CompensateWeights(),)),
    ("GPTQ, quantized inputs", 32, (CorrectWeights(ridges=()),)),
    ("ridge + GPTQ", 32, (CorrectWeights(),)),
    ("GPTQ, quantized inputs", 128, (CorrectWeights(ridges=()),)),
    ("ridge + nearest", 128, (CorrectWeights(rounding="nearest"),)),
    ("ridge + GPTQ, tokens unweighted", 128, (CorrectWeights(robust=False),)),
    ("ridge + GPTQ", 128, (CorrectWeights(),)),
    ("distil", 1024, (Distil(),)),
    ("distil, weights' rounding kept", 1024, (Distil(weight_rate=0.0),)),
    ("distil, from nearest", 1024, (Distil(closed_form=None),)),
    ("distil, outputs only", 1024, (Distil(features=0.0),)),
    ("distil, whole images, none mixed", 1024, (Distil(augment=Augment(1.0, 0.0, 0.0)),)),
    ("reconstruct, 40 steps", 128, (Reconstruct(steps=40),)),
    ("reconstruct, 40 steps, Fisher", 128, (Reconstruct(steps=40, loss="fisher"),)),
    ("reconstruct, 100 steps", 128, (Reconstruct(),)),
    ("reconstruct, 100 steps, codes kept", 128, (Reconstruct(rounding_rate=0.0),)),
    ("reconstruct, 100 steps, from float", 128, (Reconstruct(closed_form=None),)),
]


def log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """(N, classes)."""
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(20)]).log_softmax(1)


def divergence(reference: Tensor, found: Tensor) -> float:
    """Mean KL divergence in nats per image."""
    return float((reference.exp() * (reference - found)).sum(1).mean())


def allocated(model: nn.Module, calibration: Tensor, name: str, budget: str) -> GraphModule:
    """Traced, searched, with bits."""
    pipeline = recipe(name)(budget).replace(SearchScales, SearchScales(keep_grams=True))
    images = calibration[:SEARCH_IMAGES]
    return pipeline[: pipeline.position(AllocateBits) + 1].run(trace(model, images[:2]), PassContext(images))


def main() -> None:
    """Measure what is missing and print the table."""
    parser = arguments(__doc__)
    parser.set_defaults(images=1024)
    parser.add_argument("--budgets", default="W4A4,W3A3,W2A4")
    parser.add_argument(
        "--methods", default="", help="only rows where this regular expression is found in 'NAME, IMAGES images'"
    )
    parser.add_argument("--recipe", default="best")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, calibration, images, labels = load(options)
    results = Results(RESULTS / f"reconstruction_{options.model}.json")
    settings = signature(model, calibration, len(images), options.recipe)
    reference, seen = log_probabilities(model, images), log_probabilities(model, calibration)

    def row(start: GraphModule, name: str, budget: str, count: int, steps: tuple[Pass, ...]) -> dict[str, Any]:
        began = time.perf_counter()
        context = PassContext(calibration[:count])
        rewritten = Pipeline(steps, facts_of(start)).run(start, context)
        seconds = time.perf_counter() - began
        quantized = Pipeline([SubstituteQuantizers()], facts_of(rewritten)).run(rewritten, context)
        found = log_probabilities(quantized, images)
        return {
            "recipe": options.recipe,
            "budget": budget,
            "method": name,
            "images": count,
            "top1": 100 * float((found.argmax(1) == labels).double().mean()),
            "float_top1": 100 * float((reference.argmax(1) == labels).double().mean()),
            "fit_kl": divergence(seen[:count], log_probabilities(quantized, calibration[:count])),
            "test_kl": divergence(reference, found),
            "seconds": round(seconds, 1),
            "test_images": len(labels),
            "steps": [repr(step) for step in steps],
        }

    for budget in options.budgets.split(","):
        start: GraphModule | None = None
        for name, images_wanted, steps in METHODS:
            count = min(images_wanted, len(calibration))
            if not re.search(options.methods, f"{name}, {count} images"):
                continue

            def measure(name: str = name, count: int = count, steps: tuple[Pass, ...] = steps) -> dict[str, Any]:
                nonlocal start
                start = start or allocated(model, calibration, options.recipe, budget)  # noqa: B023
                return row(start, name, budget, count, steps)  # noqa: B023

            found = results.point(signature(settings, budget, name, count, [repr(step) for step in steps]), measure)
            print(
                f"{found['budget']:6} {found['method']:40} {found['images']:4} images  top-1 {found['top1']:6.2f}  "
                f"KL seen {found['fit_kl']:.4f} test {found['test_kl']:.4f}  {found['seconds']:7.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
