"""Thousands of generated calls that are no good, each of which has to be refused by a typed error.

    python -m benchmarks.bad_calls --count 3000 --seed 0

Entry points, their arguments and the values that are no good: tests/checks/bad_calls/. Prints JSON and keeps it in
benchmarks/results/bad_calls.json: typed errors by kind, and every call that raised something else or was accepted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NoReturn

import torch

from passes.search.calibrate import Calibrate
from tests.checks.bad_calls.entries import all_entries
from tests.checks.bad_calls.generator import CalibrationHasBegun, Outcome, bad_calls


def main() -> None:
    """Make the calls, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bad_calls.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    file = options.out.absolute()
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        entries = all_entries(Path(folder))
        Calibrate.apply = _begun  # type: ignore[method-assign]
        start = time.process_time()
        for call in bad_calls(entries, options.count, options.seed):
            outcome.add(call)
        seconds = time.process_time() - start
        os.chdir(file.parent)
    result = {
        "calls": options.count,
        "seed": options.seed,
        "entry_points": len(entries),
        "typed": dict(Counter(outcome.typed).most_common()),
        "damaged_files_as_good_as_before": outcome.harmless,
        "untyped": outcome.untyped,
        "accepted": outcome.accepted,
        "cpu_seconds": round(seconds, 1),
    }
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _begun(*_: object) -> NoReturn:
    raise CalibrationHasBegun


if __name__ == "__main__":
    main()
