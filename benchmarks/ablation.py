"""What each part of `best` is worth: the recipe, and the recipe with one part less or another in its place.

    python benchmarks/ablation.py embedded
    python benchmarks/ablation.py vit_tiny_patch16_224 --weights W.safetensors --calibration C.npz --test T.npz

The .npz files are those of accuracy.py. Each row: top-1 and mean KL divergence from the float model's output,
simulated, and what the allocation predicts. Results go to benchmarks/results/ablation_MODEL.json after every row, so an
interrupted run goes on where it was. --table prints what is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from accuracy import RESULTS, arguments, load
from mix_qvit import outputs, scores

import fxquant
from allocators.greedy import Greedy
from allocators.milp import Milp
from allocators.uniform import Uniform
from fxquant.artefact.cache import signature
from fxquant.graph.annotation import Role
from fxquant.session.sweep import Results
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.relevance_sensitivity import RelevanceSensitivity
from passes.allocate.score_layers import ScoreLayers
from passes.correct.compensate_weights import CompensateWeights
from passes.correct.correct_weights import CorrectWeights
from passes.pipeline.pipeline import Pipeline
from passes.prepare.balance_heads import BalanceHeads
from passes.prepare.rotate_residual import RotateResidual
from passes.recipes.best import best
from passes.recipes.lampq import lampq
from passes.recipes.mix_qvit import CLIPPED, mix_qvit
from passes.recipes.mptq_vit import mptq_vit
from passes.search.calibrate import Calibrate
from passes.search.plan_operands import PlanOperands
from passes.substitute.tabulate_gelu import TabulateGelu

RELEVANCE = ScoreLayers(RelevanceSensitivity(sensitivity="none"), roles=None)

# Row: the pipeline for a budget.
ROWS: dict[str, Callable[[str], Pipeline]] = {
    "best": best,
    "without rotation": lambda b: best(b).without(RotateResidual),
    "without balanced heads": lambda b: best(b).without(BalanceHeads),
    "without SQ-b": lambda b: best(b, fold=None),
    "clipped channel-wise in place of SQ-b": lambda b: best(b, fold=CLIPPED),
    "without rotation, clipped channel-wise": lambda b: best(b, fold=CLIPPED).without(RotateResidual),
    "without codebooks (OPT-m after GELU, uniform)": lambda b: best(b).changed(
        PlanOperands, post_gelu="asymmetric|opt-m", other="symmetric"
    ),
    "codebooks after GELU only": lambda b: best(b).changed(PlanOperands, other="symmetric"),
    "without row-log (log2, twin softmax)": lambda b: best(b).changed(
        PlanOperands, post_softmax="log2<=4|twin-softmax", tied=(Role.QK, Role.AV)
    ),
    "attention probabilities with the values' bits": lambda b: best(b).changed(PlanOperands, tied=(Role.QK, Role.AV)),
    "attention probabilities at 2 bits, from 3.5 on at 3": lambda b: best(
        b, overrides={"av.left": 2 if "3" in b else 3}
    ),
    "attention probabilities of 3 bits and more": lambda b: best(b).changed(AllocateBits, spared=()),
    "tensors of 2 bits allowed": lambda b: best(b).changed(AllocateBits, narrowest=2),
    "float GELU": lambda b: best(b).without(TabulateGelu),
    "Gram matrices of gradients alone": lambda b: best(b).changed(Calibrate, shrinkage=0.0),
    "no row makes up for another": lambda b: best(b).changed(Calibrate, outputs=False),
    "searched scales of weights": lambda b: best(b).changed(CompensateWeights, scales=(1.0,)),
    "rounded to nearest": lambda b: best(b).without(CompensateWeights),
    "closed form (ridge and GPTQ)": lambda b: best(b).without(CompensateWeights).after(AllocateBits, CorrectWeights()),
    "bits: uniform": lambda b: best(b, allocator=Uniform()),
    "bits: MPTQ-ViT (Greedy MP)": lambda b: best(b, allocator=Greedy()),
    "bits: LampQ": lambda b: lampq(b, base=best),
    "bits: Mix-QViT, relevance": lambda b: best(b).before(AllocateBits, RELEVANCE),
    "bits: Mix-QViT, product": lambda b: mix_qvit(b, base=best, allocator=Milp()),
    "quantizers and bits of MPTQ-ViT (Greedy MP)": lambda b: mptq_vit(b, allocator=Greedy()),
}


def main() -> None:
    """Measure what is missing and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("--budgets", default="W4A4,W3A3")
    parser.add_argument("--rows", default="", help="only rows whose name contains one of these, separated by ;")
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(RESULTS / f"ablation_{options.model}.json")
    if not options.table:
        model, calibration, images, labels = load(options)
        exact = outputs(model, images)
        shared = {"test_images": len(labels), "calibration_images": len(calibration), "seed": 0}
        shared["float_top1"] = scores(exact, exact, labels)["top1"]
        for budget in options.budgets.split(","):
            for row, pipeline in ROWS.items():
                if not any(part in row for part in options.rows.split(";")):
                    continue
                steps = pipeline(budget)
                key = signature(model, calibration, len(images), row, budget, repr(steps))
                if key in results.points:
                    continue
                start = time.process_time()
                compiled = fxquant.compile(model, None, calibration=calibration, recipe=steps)
                seconds = time.process_time() - start
                point = {
                    "row": row,
                    "budget": budget,
                    **scores(outputs(compiled, images), exact, labels),
                    "predicted_loss": compiled.allocation.objective if compiled.allocation else None,
                    "cpu_seconds": round(seconds, 1),
                    **shared,
                }
                results.point(key, lambda point=point: point)
                print(json.dumps(point), flush=True)
    print(table(list(results.points.values())))


def table(points: list[dict[str, object]]) -> str:
    """What has been measured, as Markdown: top-1, %, and in brackets the divergence in millinats."""
    budgets = list(dict.fromkeys(str(p["budget"]) for p in points))
    lines = ["| | " + " | ".join(budgets) + " |", "|---" * (1 + len(budgets)) + "|"]
    for row in dict.fromkeys(str(p["row"]) for p in points):
        found = {str(p["budget"]): p for p in points if p["row"] == row}
        cells = (
            f"{found[b]['top1']:.2f} ({1000 * float(str(found[b]['kl'])):.1f})" if b in found else "-" for b in budgets
        )
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
