"""What a killed compile costs: `fxquant compile` killed at random moments, begun again, and held against one in peace.

    python benchmarks/kills.py vit_tiny_patch16_224 --weights W.safetensors --num-classes 200 --calibration FOLDER

A job is one compile with a cache folder of its own, killed (SIGKILL) `--kills` times and then left to finish. The
moments are drawn uniformly over the processor time of an undisturbed run: sorted, they are how far the job should have
come when it is killed. Processor time is user and system time as the system counts it, so other work on the machine
does not matter much.

    repeated by a kill = (all attempts - undisturbed - start-up of those killed) / kills      relative to undisturbed

Start-up is what no attempt can do without: importing, reading model and images, tracing. It is measured as the same
command with a budget that nothing meets, which is refused right after. The figure with start-up is given too. Artefacts
are compared by content: every tensor, and every text without the times that journal, proofs and allocation tell. Left
out is the gap as well: the bound that the solver reports differs between any two runs in its fourth digit. Needs Linux.
Kept in benchmarks/results/kills_MODEL_RECIPE.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fxquant.artefact.artefact import load
from fxquant.artefact.container import digest, read_file

RESULTS = Path(__file__).parent / "results"
TICKS = os.sysconf("SC_CLK_TCK")
UNMET = "0.01MB"  # a budget that no model here can be held to


def main() -> None:
    """Run all jobs, print and keep JSON after every one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", default="W4A4")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--num-classes", default="1000")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--images", default="32")
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10, help="of every job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or RESULTS / f"kills_{options.model}_{options.recipe}.json"
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started_s = [cpu_s(command(options, folder, UNMET, keeps=True), fails=True) for _ in range(3)]
        bare_s = cpu_s(command(options, folder, options.budget, keeps=False))
        wanted = content_of(folder / "model.fxq")
        undisturbed_s = cpu_s(command(options, folder / "peace", options.budget, keeps=True))
        start_up_s = statistics.median(started_s)
        result: dict[str, Any] = {
            "model": options.model, "budget": options.budget, "recipe": options.recipe, "images": int(options.images),
            "undisturbed_cpu_s": round(undisturbed_s, 1), "without_cache_cpu_s": round(bare_s, 1),
            "start_up_cpu_s": round(start_up_s, 1), "jobs": [],
            "equal_with_and_without_cache": content_of(folder / "peace" / "model.fxq") == wanted,
        }  # fmt: skip
        for job in range(options.jobs):
            own = folder / f"job{job}"
            moments = sorted(draw.uniform(0, undisturbed_s) for _ in range(options.kills))
            attempts = killed_job(command(options, own, options.budget, keeps=True), moments, start_up_s)
            killed = len(attempts) - 1
            # One that is killed while it starts has not used a whole start-up.
            repeated_s = sum(attempts) - undisturbed_s - sum(min(used, start_up_s) for used in attempts[:-1])
            result["jobs"].append(
                {
                    "killed_at_cpu_s": [round(s, 1) for s in attempts[:-1]],
                    "kills": killed,
                    "all_attempts_cpu_s": round(sum(attempts), 1),
                    "repeated_per_kill": round(repeated_s / max(killed, 1) / undisturbed_s, 4),
                    "repeated_per_kill_with_start_up": round(
                        (repeated_s / max(killed, 1) + start_up_s) / undisturbed_s, 4
                    ),
                    "equal": content_of(own / "model.fxq") == wanted,
                }
            )
            kills = sum(row["kills"] for row in result["jobs"])
            result["kills"] = kills
            for key in ("repeated_per_kill", "repeated_per_kill_with_start_up"):
                result[key] = round(sum(row[key] * row["kills"] for row in result["jobs"]) / max(kills, 1), 4)
            result["all_equal"] = all(row["equal"] for row in result["jobs"])
            out.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(result["jobs"][-1]), flush=True)
    print(json.dumps({key: value for key, value in result.items() if key != "jobs"}, indent=1))


def command(options: argparse.Namespace, folder: Path, budget: str, *, keeps: bool) -> list[str]:
    """The command line of one attempt; artefact and cache lie in the folder."""
    folder.mkdir(exist_ok=True)
    return [
        sys.executable, "-m", "fxquant", "compile", options.model, budget, "--recipe", options.recipe,
        "--weights", options.weights, "--num-classes", options.num_classes, "--calibration", options.calibration,
        "--images", options.images, "--out", str(folder / "model.fxq"),
        *(["--cache", str(folder / "cache")] if keeps else ["--no-cache"]),
    ]  # fmt: skip


def killed_job(words: list[str], moments: list[float], start_up_s: float) -> list[float]:
    """Processor time, s, of every attempt: one for each moment of the job at which it is killed, and the last."""
    attempts, reached = [], start_up_s
    for moment in moments:
        # What an attempt has to do until the job is at this moment: start, and go on from where the one before was.
        limit_s = moment if not attempts else start_up_s + max(0.0, moment - reached)
        used, ended = attempt(words, limit_s)
        attempts.append(used)
        if ended:
            return attempts
        reached = max(reached, moment)
    return [*attempts, attempt(words, None)[0]]


def cpu_s(words: list[str], *, fails: bool = False) -> float:
    """Processor time, s, of a run that nobody kills."""
    return attempt(words, None, fails=fails)[0]


def attempt(words: list[str], kill_at_s: float | None, *, fails: bool = False) -> tuple[float, bool]:
    """Processor time, s, of one run, killed when it has used so much; and whether it came to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=told)
        while kill_at_s is not None and process.poll() is None:
            if used_s(process.pid) >= kill_at_s:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        code = process.wait()
        if code != -signal.SIGKILL and (code != 0) != fails:
            told.seek(0)
            raise SystemExit(f"{' '.join(words)} ended with {code}:\n{told.read().decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, code != -signal.SIGKILL


def used_s(pid: int) -> float:
    """Processor time of a running process, s; of one that has just ended, 0."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def content_of(path: Path) -> str:
    """A digest of all that an artefact holds but times, and whether a pass was recalled."""
    _, tensors = read_file(path)
    found = load(path)
    allocation = json.loads(found.allocation_json or "{}")
    for name in ("seconds", "gap"):
        allocation.pop(name, None)
    differing = ("recalled", "proof")  # notes that tell how a run came about, not what it made
    journal = [
        [entry["step"], entry["nodes_changed"], {k: v for k, v in entry["notes"].items() if k not in differing}]
        for entry in found.journal
    ]
    told = json.dumps([found.card, allocation, journal, str(found.graph_module.code)], sort_keys=True)
    return hashlib.sha256((told + digest({}, tensors)).encode()).hexdigest()


if __name__ == "__main__":
    main()
