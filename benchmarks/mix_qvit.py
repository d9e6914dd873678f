"""Mix-QViT's two criteria and their product, as small and as cheap as the uniform model: MP3, MP4, MP6.

    python benchmarks/mix_qvit.py embedded
    python benchmarks/mix_qvit.py vit_tiny_patch16_224 --weights W.safetensors --calibration C.npz --test T.npz

The .npz files are those of accuracy.py. Results go to benchmarks/results/mix_qvit_MODEL.json after every row; scores to
the folder given by --cache, layer by layer; so an interrupted run goes on where it was. --table prints what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import RESULTS, arguments, load
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from allocators.milp import Milp
from allocators.quadratic import Interaction, Quadratic
from allocators.uniform import Uniform
from fxquant.artefact.cache import Cache, signature
from fxquant.graph.annotation import Source, annotation_of, planned_nodes
from fxquant.graph.capture.tracing import trace
from fxquant.report.progress import RichProgress
from fxquant.sensitivity.interactions import Place, correlations
from fxquant.sensitivity.measured import Divergence
from fxquant.session.sweep import Results
from passes.allocate.allocate_bits import ALLOCATION, AllocateBits
from passes.allocate.score_layers import ScoreLayers
from passes.pipeline.contract import PassContext
from passes.recipes.mix_qvit import OPTIMISATIONS, mix_qvit

TIED: dict[str, Any] = {"allocator": Milp(tie_weights_and_activations=True)}

# Row: options of mix_qvit, whether layers are scored at all.
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    "uniform": ({"allocator": Uniform()}, False),
    "predicted loss": ({}, False),
    "LRP only": ({"sensitivity": "none"}, True),
    "sensitivity only": ({"importance": "none"}, True),
    "product": ({}, True),
    "LRP only, W and A tied": ({"sensitivity": "none", **TIED}, True),
    "sensitivity only, W and A tied": ({"importance": "none", "operands": "together"}, True),
    "product, W and A tied": ({"operands": "together"}, True),
    "sensitivity only, others at 4 bits": ({"importance": "none", "baseline_bits": 4}, True),
    "sensitivity only, from 3 bits on": ({"importance": "none"}, True),
    "product, from 3 bits on": ({}, True),
    "sensitivity with interactions": ({"importance": "none"}, True),
}
STRONGEST, INTERACTION_BITS = 12, 3


def compiled(searched: GraphModule, context: PassContext, method: str, budget: str, optimise: str) -> GraphModule:
    """The searched graph allocated by one method, then optimised."""
    options, scored = METHODS[method]
    if method.endswith("interactions"):
        options = {**options, "allocator": Quadratic(interactions(searched, context))}
    pipeline = mix_qvit(budget, optimise=optimise, **options)
    if method.endswith("from 3 bits on"):
        pipeline = pipeline.changed(AllocateBits, narrowest=3)
    if not scored:
        pipeline = pipeline.without(ScoreLayers)
    return pipeline[pipeline.position(ScoreLayers if scored else AllocateBits) :].run(searched, context)


def is_free(node: Node, group: tuple[int, ...]) -> bool:
    """Whether the width that these operands share is a choice."""
    return any(o.candidates and o.source is not Source.IMAGE for o in (annotation_of(node).operands[i] for i in group))


def named(place: Place) -> tuple[str, str]:
    """The layer, and which of its operands, as the allocator calls them."""
    annotation = annotation_of(place[0])
    row = annotation.groups.index(place[1])
    is_split = annotation.weight is None and all(annotation.groups)
    return annotation.layer, (("weight", "activation"), ("left", "right"))[is_split][row]


def interactions(searched: GraphModule, context: PassContext) -> tuple[Interaction, ...]:
    """Correlations of all pairs among the operands that cost most, kept in the cache."""

    def found() -> list[Any]:
        places = [(n, group) for n in planned_nodes(searched) for group in annotation_of(n).groups if is_free(n, group)]
        divergence = Divergence(searched, context.images, 32)
        pairs = correlations(divergence, places, INTERACTION_BITS, STRONGEST)
        return [(named(first), named(second), r) for first, second, r in pairs]

    key = context.signature(searched, "interactions", INTERACTION_BITS, STRONGEST, "nearest")
    return tuple(Interaction(tuple(a), tuple(b), r) for a, b, r in context.cache.recall(key, found))


def outputs(model: nn.Module, images: Tensor, batch: int = 50) -> Tensor:
    """Logits, float64 (N, classes)."""
    with torch.inference_mode():
        return torch.cat([model(x) for x in images.split(batch)]).double()


def scores(logits: Tensor, exact: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, %, and mean KL divergence from the float model's output, nats per image."""
    log_p, log_q = exact.log_softmax(1), logits.log_softmax(1)
    return {
        "top1": 100 * float((logits.argmax(1) == labels).double().mean()),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(1).mean()),
    }


def measure(model: nn.Module, calibration: Tensor, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """Measure what is missing."""
    results = Results(RESULTS / f"mix_qvit_{options.model}.json")
    settings = signature(model, calibration, len(images))
    shared = {"test_images": len(labels), "calibration_images": len(calibration), "seed": 0}
    exact = outputs(model, images)
    results.point(signature(settings, "float"), lambda: {"method": "float", **scores(exact, exact, labels), **shared})
    searched: GraphModule | None = None
    with RichProgress() as progress:
        for optimise in options.optimise.split(","):
            for bits in options.bits.split(","):
                for method in (m for m in METHODS if not options.methods or m in options.methods.split(";")):
                    key = signature(settings, method, bits, optimise)
                    if key in results.points:
                        continue
                    context = PassContext(calibration, cache=Cache(options.cache), progress=progress)
                    if searched is None:
                        # With statistics kept, for the optimisations that need them; the candidates are the same.
                        whole = mix_qvit("MP4", optimise="closed-form")
                        searched = whole[: whole.position(ScoreLayers)].run(trace(model, calibration[:2]), context)
                        context = PassContext(calibration, cache=context.cache, progress=progress)
                    start = time.perf_counter()
                    quantized = compiled(searched, context, method, f"MP{bits}", optimise)
                    seconds = time.perf_counter() - start
                    allocation = ALLOCATION.get(quantized)
                    assert allocation is not None
                    point = {
                        "method": method,
                        "optimise": optimise,
                        "bits": int(bits),
                        **scores(outputs(quantized, images), exact, labels),
                        "usage": allocation.usage,
                        "limits": allocation.budget.limits,
                        "status": allocation.status,
                        "seconds": seconds,
                        "seconds_by_pass": {e.step.split("(")[0]: e.seconds for e in context.journal.entries},
                        "weight_bits": allocation.weight_bits,
                        "activation_bits": allocation.activation_bits,
                        **shared,
                    }
                    results.point(key, lambda point=point: point)
                    print(json.dumps({k: v for k, v in point.items() if not k.endswith("_bits")}), flush=True)


def table(model: str) -> str:
    """What has been measured, as Markdown."""
    points = json.loads((RESULTS / f"mix_qvit_{model}.json").read_text())["points"]
    reference = next(p for p in points if p["method"] == "float")
    lines = [
        f"Top-1, %, and mean KL divergence from float, millinats, of {reference['test_images']} images; "
        f"float {reference['top1']:.2f}; {reference['calibration_images']} calibration images, "
        f"seed {reference['seed']}; simulated.\n"
    ]
    rows = [p for p in points if "bits" in p]
    widths = sorted({p["bits"] for p in rows}, reverse=True)
    for optimise in dict.fromkeys(p["optimise"] for p in rows):
        lines += [
            f"| optimise {optimise} | " + " | ".join(f"MP{b}" for b in widths) + " |",
            "|---" * (1 + len(widths)) + "|",
        ]
        for method in METHODS:
            found = {p["bits"]: p for p in rows if (p["method"], p["optimise"]) == (method, optimise)}
            if found:
                cells = (f"{found[b]['top1']:.2f} ({1000 * found[b]['kl']:.1f})" if b in found else "-" for b in widths)
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", default="6,4,3")
    parser.add_argument("--methods", default="", help="only these rows, separated by ;")
    parser.add_argument("--optimise", default=",".join(OPTIMISATIONS))
    parser.add_argument("--cache", type=Path, help="folder for scores")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.table:
        measure(*load(options), options)
    print(table(options.model))


if __name__ == "__main__":
    main()
