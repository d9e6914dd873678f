"""The results of conformance.py as a page of the documentation: what works, and what is refused with which message.

python -m benchmarks.conformance_table    # benchmarks/results/conformance.json to docs/reference/conformance.md
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "conformance.json"
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "conformance.md"

_HEAD = """# What was tried, and what works

Written by `python -m benchmarks.conformance_table` from `benchmarks/results/conformance.json`, which
`python -m benchmarks.conformance` makes: {total} architectures beyond those of `tests/conformance`, each a small one
(one or two layers, few channels) with random weights of which all count: LayerScale about 1, gates open, position
embeddings and biases not zero, batch norms with the statistics of the images. Each is compiled by the default recipe at
W8A8 with 8 random images, saved, loaded on integer kernels{exported}.

It is **whole** where the tree of outputs is the model's, their cosine to the float model's is at least 0.99 (or, where
that is less, not below what noise leaves: the float model's, with uniform noise of an 8-bit step at the inputs of its
linear layers and convolutions, eight draws, their mean less their standard deviation), integer kernels agree with the
simulated model within the tolerance of known answers, and every softmax is the attention of a quantized product, or is
named in the journal as none.
**Refused** is what raises an error of fxquant's with a remedy; everything else is a **fault**.

This says that a model computes what it should; accuracy of trained models is on [its own page](../results.md).

{whole} of {total} are whole, {refused} are refused, {fault} are faults; {left} of the list have not been run
yet. {remark}

Versions: {versions}.
"""


def page(document: dict[str, Any]) -> str:
    """The page, as Markdown. document: what conformance.py keeps."""
    models: dict[str, dict[str, Any]] = document["models"]
    counts = Counter(found["status"] for found in models.values())
    exported = sum(found["stage"] == "export" and found["status"] == "whole" for found in models.values())
    text = _HEAD.format(
        total=len(models),
        left=document["listed"] - len(models),
        whole=counts["whole"],
        refused=counts["refused"],
        fault=counts["fault"],
        remark=document.get("remark", ""),
        exported=f",\nand {exported} of them exported to ONNX, where ONNX Runtime gives the known answers",
        versions=", ".join(f"{package} {version}" for package, version in document["versions"].items()),
    )
    groups = list(dict.fromkeys(name.partition(":")[0] for name in models))
    lines = ["", "| from | tried | whole | refused | faults |", "|---|---|---|---|---|"]
    for group in groups:
        found = Counter(entry["status"] for name, entry in models.items() if name.startswith(f"{group}:"))
        lines.append(f"| {group} | {found.total()} | {found['whole']} | {found['refused']} | {found['fault']} |")
    lines += [
        "",
        "Columns: `cosine` to the float model, the least over the tensors of the output; `float`, the share of",
    ]
    lines += [
        "multiply-accumulates that stay in float; `integer`, the share that runs on integer kernels; `attentions`,"
    ]
    lines += ["found of the softmaxes in the graph; `ONNX`, whether ONNX Runtime gave the known answers."]
    for group in groups:
        lines += ["", f"## {group}", "", "| architecture | cosine | float | integer | attentions | ONNX |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_row(name, found) for name, found in models.items() if name.startswith(f"{group}:")]
    others = {name: found for name, found in models.items() if found["status"] != "whole"}
    lines += ["", "## Not whole", ""] if others else []
    lines += [
        f"- **{name}** ({found['status']}, at {found['stage']}): {found['message']}" for name, found in others.items()
    ]
    return text + "\n".join(lines) + "\n"


def _row(name: str, found: dict[str, Any]) -> str:
    title = name.partition(": ")[2] + (" (torch.export)" if found["captured_by"] == "torch.export" else "")
    if found["status"] != "whole":
        return f"| {title} | {found['status']} | | | | |"
    onnx = "yes" if found["stage"] == "export" else "not tried"
    attentions = f"{found['attentions_found']} of {found['attentions']}"
    shares = f"{found['float_share']:.1%} | {found['integer_share']:.1%}"
    plain = found.get("plain_cosine")
    beside = f" ({plain:.3f} +- {found['plain_deviation']:.3f} with noise)" if plain is not None else ""
    return f"| {title} | {found['cosine']:.4f}{beside} | {shares} | {attentions} | {onnx} |"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
