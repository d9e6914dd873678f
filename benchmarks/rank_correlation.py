"""Rank correlation between predicted and measured sensitivity of layers, for every metric.

    python benchmarks/rank_correlation.py embedded
    python benchmarks/rank_correlation.py vit_tiny_patch16_224 --weights W.safetensors --calibration C.npz --test T.npz

Measured: KL divergence from the float model, nats per image, with one layer (qkv, proj, fc1, fc2 of every block,
weights and inputs) at b bits and the rest float, on images that nothing was calibrated on (the first of the test file).
Predicted: each metric's score for that layer at b bits, from the calibration images. Spearman's rho and Kendall's tau-b
over all layers, and Spearman's rho within each of the four types, averaged: a metric whose scale differs between types
can rank well within them and badly over all. Results: benchmarks/results/rank_correlation_MODEL_BASE.json and, with
--plot, a picture like LampQ's Figure 5.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxquant.artefact.container import write_file
from fxquant.data import embedded
from fxquant.data.models import load_model
from fxquant.graph.annotation import Annotation, annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.report.plots import plot_sensitivity
from fxquant.sensitivity.measured import Divergence
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.metrics import FisherTrace, NoiseRatio, NuclearNorm, PredictedLoss, TypeAwareFisher
from passes.allocate.score_layers import LAMPQ_ROLES, Metric
from passes.pipeline.contract import PassContext
from passes.recipes import RECIPES

RESULTS = Path(__file__).parent / "results"
METRICS: dict[str, Metric] = {
    "SQNR": NoiseRatio(),
    "predicted loss (of the scale search)": PredictedLoss(),
    "Fisher": FisherTrace(),
    "type-aware Fisher, 4 sampled": TypeAwareFisher(mu=4),
    "type-aware Fisher, all sampled": TypeAwareFisher(mu=10**6),
    "nuclear norm": NuclearNorm(),
}


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties share their mean: float64 (n,)."""
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's rho, by the correlation of ranks."""
    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def kendall(left: np.ndarray, right: np.ndarray) -> float:
    """Kendall's tau-b."""
    upper = np.triu_indices(len(left), 1)
    signs = [np.sign(values[:, None] - values[None])[upper] for values in (left, right)]
    return float((signs[0] * signs[1]).sum() / np.sqrt(np.abs(signs[0]).sum() * np.abs(signs[1]).sum()))


def correlations(predicted: np.ndarray, measured: np.ndarray, types: np.ndarray) -> dict[str, float]:
    """All three figures over layers (n,)."""
    within = [spearman(predicted[types == kind], measured[types == kind]) for kind in np.unique(types)]
    return {
        "spearman": spearman(predicted, measured),
        "kendall": kendall(predicted, measured),
        "spearman_within_types": float(np.mean(within)),
    }


def compared(
    model: nn.Module, calibration: Tensor, unseen: Tensor, base: str, bits: list[int], seed: int
) -> tuple[dict[str, Any], dict[str, dict[str, float]], dict[str, str]]:
    """Correlations by metric and bits; scores by metric and layer at the lowest bits; roles by layer."""
    pipeline = RECIPES[base]("W4A4")
    searched = pipeline[: pipeline.position(AllocateBits)].run(
        trace(model, calibration[:2]), PassContext(calibration, seed=seed)
    )
    nodes = nodes_with_role(searched, *LAMPQ_ROLES)
    annotations: list[Annotation] = [annotation_of(node) for node in nodes]
    layers = [annotation.layer for annotation in annotations]
    types = np.array([str(annotation.role) for annotation in annotations])
    columns = {c.bits: index for index, c in enumerate(annotations[0].operands[0].candidates)}
    divergence = Divergence(searched, unseen)
    measured = {b: np.array(divergence.of_each([{node: (b, b)} for node in nodes])) for b in bits}
    rows: dict[str, Any] = {}
    panels: dict[str, dict[str, float]] = {}
    for name, metric in METRICS.items():
        found = metric.score(searched, nodes, PassContext(calibration, seed=seed))
        for b in bits:
            predicted = np.array([sum(scores[columns[b]] for scores in found.layers[la]) for la in layers])
            rows.setdefault(name, {})[str(b)] = correlations(predicted, measured[b], types)
            if b == bits[0]:
                panels[name] = dict(zip(layers, predicted.tolist(), strict=True))
    panels["measured"] = dict(zip(layers, measured[bits[0]].tolist(), strict=True))
    return rows, panels, dict(zip(layers, types.tolist(), strict=True))


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--base", default="adalog" if "adalog" in RECIPES else "mptq_vit", help="recipe of quantizers")
    parser.add_argument("--bits", default="3,4,6")
    parser.add_argument("--seed", type=int, default=0, help="slice of the calibration file, and of random draws")
    parser.add_argument("--images", type=int, default=32, help="calibration images")
    parser.add_argument("--unseen", type=int, default=64, help="images to measure on")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, last = options.images * options.seed, options.images * (options.seed + 1)
    if options.model == "embedded":
        model, calibration = embedded.load_model(), embedded.calibration_images(last)[first:]
        unseen, _ = embedded.test_images(options.unseen)
    else:
        test = np.load(options.test)
        named = load_model(options.model, options.weights, num_classes=int(test["labels"].max()) + 1)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (named.preprocessing.mean, named.preprocessing.std))
        model = named.model
        calibration, unseen = (
            (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
            for pixels in (np.load(options.calibration)["images"][first:last], test["images"][: options.unseen])
        )
    bits = [int(b) for b in options.bits.split(",")]
    rows, panels, roles = compared(model, calibration, unseen, options.base, bits, options.seed)
    content = {
        "base": options.base, "seed": options.seed, "calibration_images": len(calibration),
        "unseen_images": len(unseen), "layers": len(roles), "correlations": rows, "scores": panels,
    }  # fmt: skip
    write_file(
        RESULTS / f"rank_correlation_{options.model}_{options.base}.json", json.dumps(content, indent=1).encode()
    )
    if options.plot:
        shown = {name: panels[name] for name in ("nuclear norm", "Fisher", "type-aware Fisher, 4 sampled", "measured")}
        plot_sensitivity(options.plot, shown, roles)
    print("| metric | " + " | ".join(f"{b} bits: rho, tau, rho within types" for b in bits) + " |")
    print("|---" * (len(bits) + 1) + "|")
    for name, by_bits in rows.items():
        cells = [" ".join(f"{value:.2f}" for value in by_bits[str(b)].values()) for b in bits]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
