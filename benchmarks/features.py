"""Features of a quantized model beside those of the float one: how far apart, and what is worth what is made of them.

    python -m benchmarks.features embedded
    python -m benchmarks.features deit_tiny_patch16_224 --weights W.safetensors --calibration C.npz --test T.npz

What is compiled gives tokens and pooled features, without the head, with objective="features". Both models' pooled
features go through the model's own head, which is float, and through a k-nearest-neighbour classifier (k = 20, cosine,
votes weighted by exp(cosine / 0.07), as DINO's) of the labelled calibration images, whose features come from the same
model. The .npz files are those of accuracy.py; that of calibration has `labels` too, its first --images are calibrated
on, and all of them are neighbours. Results: benchmarks/results/features_MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy import RESULTS, arguments, load
from fxquant.data import embedded
from fxquant.session.session import Session

NEIGHBOURS, TEMPERATURE, BUDGETS = 20, 0.07, ("W8A8", "W4A4")


class Features(nn.Module):
    """The tokens and the pooled features of a timm model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) and pooled features (B, C) of images."""
        tokens = self.model.forward_features(images_bchw)
        return tokens, self.model.forward_head(tokens, pre_logits=True)


@torch.inference_mode()
def features_of(model: nn.Module, images: Tensor, batch: int = 20) -> tuple[Tensor, Tensor]:
    """Tokens (N, T, C) and pooled features (N, C) of all images (N, C, H, W)."""
    tokens, pooled = zip(*(model(part) for part in images.split(batch)), strict=True)
    return torch.cat(tokens), torch.cat(pooled)


def neighbours_say(known_nc: Tensor, labels_n: Tensor, asked_mc: Tensor) -> Tensor:
    """The classes (M,) that the nearest of the known features (N, C), labelled (N,), vote for."""
    cosines, places = (normal(asked_mc) @ normal(known_nc).t()).topk(min(NEIGHBOURS, len(known_nc)), dim=1)
    votes = torch.zeros(len(asked_mc), int(labels_n.max()) + 1)
    return votes.scatter_add_(1, labels_n[places], (cosines / TEMPERATURE).exp()).argmax(1)


def normal(features_nc: Tensor) -> Tensor:
    """Features of length 1."""
    return nn.functional.normalize(features_nc, dim=1)


def mean_and_error(values_n: Tensor) -> tuple[float, float]:
    """The mean, and its standard error over the choice of images."""
    return float(values_n.mean()), float(values_n.std()) / math.sqrt(len(values_n))


def relative_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """|found - wanted| / |wanted| of every image (N,)."""
    return (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)


def labelled(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """The model, labelled images whose features are known, their labels, test images and theirs."""
    count, calibrated = options.images, embedded.CALIBRATION if options.model == "embedded" else options.calibration
    with np.load(calibrated) as data:
        labels = torch.from_numpy(data["labels"].astype(np.int64))
    options.images = len(labels)
    model, known, images, wanted = load(options)
    options.images = count
    return model, known, labels, images, wanted


def main() -> None:
    """Measure, print and keep one row for each budget."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    model, known, known_labels, images, labels = labelled(options)
    whole = Features(model).eval()
    session = Session(whole, known[: options.images], objective="features")
    _, float_known = features_of(whole, known)
    float_tokens, float_pooled = features_of(whole, images)

    def right(known_nc: Tensor, pooled_nc: Tensor) -> dict[str, Tensor]:
        """Whether every test image is classified correctly, by the head and by neighbours, in percent."""
        with torch.inference_mode():
            by_head = model.get_classifier()(pooled_nc).argmax(1)
        by_neighbours = neighbours_say(known_nc, known_labels, pooled_nc)
        return {"head": 100.0 * (by_head == labels), "neighbours": 100.0 * (by_neighbours == labels)}

    in_float, rows = right(float_known, float_pooled), list[dict[str, Any]]()
    for budget in BUDGETS:
        compiled = session.compile(budget)
        lowered = compiled.lowered("auto")
        tokens, pooled = features_of(lowered, images)
        row: dict[str, Any] = {"budget": budget, "execution": str(lowered.card["execution"])}
        row["tokens"] = mean_and_error(relative_errors(tokens, float_tokens))
        row["pooled"] = mean_and_error(relative_errors(pooled, float_pooled))
        for name, found in right(features_of(lowered, known)[1], pooled).items():
            row[name] = {
                "float": mean_and_error(in_float[name]),
                "quantized": mean_and_error(found),
                "difference": mean_and_error(found - in_float[name]),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
        document = {
            "model": options.model, "calibration_images": options.images, "known_images": len(known_labels),
            "test_images": len(labels), "seed": 0, "rows": rows,
        }  # fmt: skip
        (RESULTS / f"features_{options.model}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
