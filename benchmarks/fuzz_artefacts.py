"""Changed artefacts, sealed again, used as a user would: what is not refused with a typed error is a fault.

    python -m benchmarks.fuzz_artefacts --cases 10000 --jobs 2      # from the repository's root

Bases are tiny models (a ViT and a Swin) of several recipes. Each case changes one to three things in one of them
(`tests/artefact/mutations.py`), and is loaded, reported, inspected, run on two images, lowered and run again, in a
child process, so that a crash is seen. Counted: untyped errors, crashes, uses of over 5 CPU s, and uses whose peak
memory grows by more than 4 times the file and 200 MB. Prints JSON and keeps it in
benchmarks/results/fuzz_artefacts.json. A case takes a tenth of a CPU second. With --kept FILE a run that was ended goes
on: cases that the file has, of the same code, are not used again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import fxquant
from fxquant.artefact.cache import code_signature
from tests.artefact.mutations import Base, mutated
from tests.artefact.use import use

SLOW_CPU_S = 5.0
STUCK_S = 900.0  # by the clock, so that a machine busy with other work is no fault; what is slow is told by CPU seconds
CASES_OF_A_CHILD = 250
MEMORY_FACTOR, MEMORY_FLOOR = 4, 200_000_000
RECIPES: dict[str, dict[str, Any]] = {
    "naive": {"budget": "W4A4", "recipe": "naive_min_max"},
    "best": {"budget": "W4A4", "recipe": "best"},
    "adalog": {"budget": "W3A3", "recipe": "adalog"},
    "opt_m": {"budget": "W4A4", "recipe": "mptq_vit", "fully_quantized": True},
}


def main() -> None:
    """Fuzz and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--jobs", type=int, default=1, help="child processes at one time")
    parser.add_argument("--kept", type=Path, help="a file of outcomes, to go on with")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker is not None:
        work(options.worker, range(options.first, options.first + options.cases))
        return
    seeds, code = range(options.first, options.first + options.cases), code_signature()
    has_file = options.kept is not None and options.kept.exists()
    lines = [json.loads(line) for line in options.kept.read_text().splitlines()] if has_file else []
    kept = [case for case in lines if case["code"] == code and case["seed"] in seeds]
    todo = sorted(set(seeds) - {case["seed"] for case in kept})
    with tempfile.TemporaryDirectory() as folder:
        make_bases(Path(folder))
        with ThreadPoolExecutor(options.jobs) as pool, (options.kept or Path(os.devnull)).open("a") as file:
            for found in pool.map(partial(watch, Path(folder)), runs_of(todo)):
                kept += found
                file.write("".join(f"{json.dumps(case | {'code': code})}\n" for case in found))
                file.flush()
                print(f"{len(kept)} cases, {summary(kept)['faults']} faults", file=sys.stderr, flush=True)
    text = json.dumps(summary(kept), indent=1)
    print(text)
    (Path(__file__).parent / "results" / "fuzz_artefacts.json").write_text(text + "\n")


def make_bases(folder: Path) -> None:
    """Save tiny models under every recipe."""
    for name, options in RECIPES.items():
        for family, model in (("vit", vit()), ("swin", swin())):
            side = 16 if family == "vit" else 32
            images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
            fxquant.compile(model, calibration=images, **options).save(folder / f"{family}_{name}.fxq")


def vit() -> nn.Module:
    """A ViT of one block on images of 16 x 16."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **sizes)
    return model.eval()


def swin() -> nn.Module:
    """A Swin of three blocks on images of 32 x 32."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "num_classes": 5, "window_size": 4}
    model: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 1), num_heads=(1, 2), **sizes)
    return model.eval()


def work(folder: Path, seeds: range) -> None:
    """Use one case after another; a line of JSON before and after each."""
    bases = [Base.read(path) for path in sorted(folder.glob("*.fxq"))]
    warm = folder / f"{bases[0].name}.fxq"
    use(warm, bases[0].image_shape)  # what is loaded once is no case's
    for seed in seeds:
        base = bases[seed % len(bases)]
        changes, content = mutated(base, seed)
        with tempfile.TemporaryDirectory() as case:
            path = Path(case) / "case.fxq"
            path.write_bytes(content)
            print(json.dumps({"seed": seed, "changes": changes, "base": base.name}), flush=True)
            before = _peak(reset=True)
            outcomes = use(path, base.image_shape)
            grown = _peak() - before
        told = [[o.stage, o.error, o.is_typed, o.message, round(o.cpu_s, 2)] for o in outcomes]
        print(json.dumps({"seed": seed, "grown": grown, "bytes": len(content), "stages": told}), flush=True)


def _peak(reset: bool = False) -> int:
    """Peak resident memory in bytes, Linux; after `reset` counted from now, and what is resident now is given."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{'VmRSS' if reset else 'VmHWM'}:\s+(\d+)", status)[1])  # type: ignore[index]


def runs_of(seeds: list[int]) -> list[range]:
    """Ascending seeds as runs without gaps, each for one child."""
    runs: list[range] = []
    for seed in seeds:
        if runs and runs[-1].stop == seed and len(runs[-1]) < CASES_OF_A_CHILD:
            runs[-1] = range(runs[-1].start, seed + 1)
        else:
            runs.append(range(seed, seed + 1))
    return runs


def watch(folder: Path, seeds: range) -> list[dict[str, Any]]:
    """All cases by a child; one that dies or is stuck is counted, and the next child goes on after it."""
    found: list[dict[str, Any]] = []
    first = seeds.start
    while first < seeds.stop:
        command = [sys.executable, "-m", "benchmarks.fuzz_artefacts", "--worker", str(folder)]
        command += ["--first", str(first), "--cases", str(seeds.stop - first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            begun, end = _follow(child, found)
        if begun is not None:
            found.append(begun | {"end": end})
        elif not found or found[-1]["seed"] + 1 < seeds.stop:
            raise RuntimeError(f"the child that begins at {first} did not do all of {seeds}: {end}")
        first = found[-1]["seed"] + 1
    return found


def _follow(child: subprocess.Popen[str], found: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """Gather a child's cases; the one it did not end, and how that one ended."""
    begun: dict[str, Any] | None = None
    assert child.stdout is not None
    clock = threading.Timer(STUCK_S, child.kill)
    clock.start()
    for line in child.stdout:
        clock.cancel()
        clock = threading.Timer(STUCK_S, child.kill)
        clock.start()
        told = json.loads(line)
        if "stages" in told:
            found.append({**(begun or {}), **told})
            begun = None
        else:
            begun = told
    clock.cancel()
    return begun, f"crash or stuck, exit {child.wait()}"


def summary(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and every fault."""
    faults: list[dict[str, Any]] = []
    ended: Counter[str] = Counter()
    for case in outcomes:
        where = {key: case[key] for key in ("seed", "base", "changes")}
        if "end" in case:
            faults.append({**where, "fault": case["end"]})
            continue
        errors = [stage for stage in case["stages"] if stage[1]]
        ended[f"{errors[0][1]} at {errors[0][0]}" if errors else "ran to the end"] += 1
        faults += [
            {**where, "fault": "untyped", "stage": s[0], "error": s[1], "message": s[3]} for s in errors if not s[2]
        ]
        faults += [
            {**where, "fault": "slow", "stage": s[0], "cpu_s": s[4]} for s in case["stages"] if s[4] > SLOW_CPU_S
        ]
        if case["grown"] > MEMORY_FACTOR * case["bytes"] + MEMORY_FLOOR:
            faults.append({**where, "fault": "memory", "MB": case["grown"] // 10**6, "bytes": case["bytes"]})
    used = [case for case in outcomes if "stages" in case]
    return {
        "cases": len(outcomes),
        "faults": len(faults),
        "by_fault": dict(Counter(fault["fault"] for fault in faults)),
        "ended": dict(ended.most_common()),
        "largest_growth_MB": round(max((case["grown"] for case in used), default=0) / 1e6, 1),
        "mean_case_cpu_s": round(sum(s[4] for case in used for s in case["stages"]) / max(len(used), 1), 3),
        "longest_stage_cpu_s": max((stage[4] for case in used for stage in case["stages"]), default=0.0),
        "first_faults": faults[:200],
    }


if __name__ == "__main__":
    main()
