"""How much faster ranks of a process group calibrate, search and score; random weights.

    torchrun --nproc-per-node 1 benchmarks/rank_speed.py vit_tiny_patch16_224 --images 16
    torchrun --nproc-per-node 2 benchmarks/rank_speed.py vit_tiny_patch16_224 --images 16 --steps 10

`--steps` adds so many steps of training (`Distil`). For every pass the seconds by the clock, and the processor seconds
of the rank that takes most, all that ranks tell each other included; waiting takes none. On a machine that others use
too, the ratio of processor seconds is what the clock would show on one of one's own with a core for each rank. Results
go under "ranks" of benchmarks/results/rank_speed_MODEL.json, beside those of other numbers of ranks; of several runs
the least is kept, since whatever else runs on a machine only adds to it. After a change of the passes remove the file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch.fx import GraphModule

from fxquant import ranks
from fxquant.graph.capture.tracing import trace
from passes.allocate.relevance_sensitivity import RelevanceSensitivity
from passes.allocate.score_layers import ScoreLayers
from passes.correct.distil import Distil
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import best
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers

BITS = (3, 6)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the passes once and keep their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--depth", type=int, help="blocks of the model; all by default")
    parser.add_argument("--steps", type=int, help="steps of training; none by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    depth = {} if options.depth is None else {"depth": options.depth}
    model = timm.create_model(options.model, **depth).eval()
    images = torch.randn(options.images, 3, 224, 224)
    score = ScoreLayers(RelevanceSensitivity(importance="none"), roles=None)
    passes = [step for step in best("W4A4", bits=BITS) if type(step).__name__ != "CheckBudget"]
    pipeline = Pipeline(passes).after(SearchScales, score)
    pipeline = pipeline[: pipeline.position(ScoreLayers) + 4]  # up to compensated weights, substituted
    if options.steps:
        pipeline = pipeline.before(SubstituteQuantizers, Distil(options.steps, checks=1, closed_form=None))
    graph_module = trace(model, images[:2])
    wall_s, cpu_s = [time.perf_counter()], [time.process_time()]

    def passed(graph_module: GraphModule) -> None:
        wall_s.append(time.perf_counter())
        cpu_s.append(time.process_time())

    with ranks.together(lambda: {"command line": vars(options)}):
        dist.barrier()
        wall_s[0], cpu_s[0] = time.perf_counter(), time.process_time()
        pipeline.run(graph_module, PassContext(images), passed, in_place=True)
        cpu_of_ranks = ranks.from_all("processor seconds", cpu_s)
        if ranks.is_first():
            keep(options, pipeline, wall_s, cpu_of_ranks)
    dist.destroy_process_group()


def keep(options: argparse.Namespace, pipeline: Pipeline, wall_s: list[float], cpu_of_ranks: list[list[float]]) -> None:
    """Add the times of this number of ranks to the file of the model."""
    found = {
        type(step).__name__: {
            "wall_s": round(wall_s[place + 1] - wall_s[place], 2),
            "cpu_s": round(max(cpu_s[place + 1] - cpu_s[place] for cpu_s in cpu_of_ranks), 2),
        }
        for place, step in enumerate(pipeline)
    }
    path = RESULTS / f"rank_speed_{options.model}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    kept |= {
        "model": options.model,
        "depth": options.depth,
        "weights": "random",
        "images": options.images,
        "bits": BITS,
        "training_steps": options.steps,
    }
    before = kept.setdefault("ranks", {}).get(str(len(cpu_of_ranks)), {})
    for name, times in found.items():
        found[name] = {key: min(value, before.get(name, times)[key]) for key, value in times.items()}
    kept["ranks"][str(len(cpu_of_ranks))] = found
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
