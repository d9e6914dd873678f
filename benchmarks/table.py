"""The results of accuracy.py as Markdown tables.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PROTOCOLS = {False: "Softmax and LayerNorm float", True: "fully quantized"}


def table(points: list[dict[str, Any]], full: bool) -> list[str]:
    """Rows methods, columns widths, of one protocol."""
    chosen = [p for p in points if "bits" in p and p["fully_quantized"] is full and "fc1" not in p["method"]]
    widths = sorted({p["bits"] for p in chosen}, reverse=True)
    if not chosen:
        return []
    lines = [
        f"| {PROTOCOLS[full]} | " + " | ".join(f"W{b}A{b}" for b in widths) + " |",
        "|---" * (len(widths) + 1) + "|",
    ]
    for method in dict.fromkeys(p["method"] for p in chosen):
        found = {p["bits"]: f"{p['top1']:.1f}" for p in chosen if p["method"] == method}
        lines.append(f"| {method} | " + " | ".join(found.get(b, "-") for b in widths) + " |")
    return [*lines, ""]


def main() -> None:
    """Print every model's tables."""
    for path in sorted(RESULTS.glob("accuracy_*.json")):
        points = json.loads(path.read_text())["points"]
        reference = next(p for p in points if p["method"] == "float")
        print(f"### {path.stem.removeprefix('accuracy_')}\n")
        print(
            f"Top-1, %, of {reference['test_images']} images; float {reference['top1']:.1f}; "
            f"{reference['calibration_images']} calibration images, seed {reference['seed']}; simulated.\n"
        )
        print("\n".join(table(points, False) + table(points, True)))
        for point in points:
            if "fc1" in point["method"]:
                print(f"- {point['method']}, A{point['bits']}: {point['top1']:.1f}")
        print()


if __name__ == "__main__":
    main()
