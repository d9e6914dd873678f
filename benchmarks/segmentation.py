"""SAM's image encoder and a head that finds people, quantized as one model: features and overlap beside float's.

    python -m benchmarks.segmentation --data DATA/penn_fudan --weights VIT.safetensors

What is built is the `ImageEncoderViT` of the package segment-anything (Kirillov et al., Segment Anything, 2023) in the
shape of a ViT-tiny, 224 x 224: windows of 7 x 7 tokens but for four global blocks, relative positions in every
attention, and the neck. SAM's own weights were not at hand. Blocks and patch embedding have those of timm's
vit_tiny_patch16_224, relative positions are drawn at random (standard deviation 0.02), and the neck and the head, two
convolutions and an upsampling, are trained here for seconds on the training photographs of Penn-Fudan, with all below
them frozen. Results: benchmarks/results/segmentation_sam_vit_tiny.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from segment_anything.modeling.image_encoder import ImageEncoderViT
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.accuracy import RESULTS
from benchmarks.features import mean_and_error, relative_errors
from fxquant.session.session import Session
from passes.recipes.best import best
from passes.recipes.mptq_vit import naive_min_max

SIDE, PATCH, CHANNELS, NECK, STEPS, BATCH = 224, 16, 192, 64, 300, 16
METHODS: dict[str, Callable[..., Any]] = {"best": best, "naive_min_max": naive_min_max}


class Segmenter(nn.Module):
    """Images (B, 3, 224, 224) to the neck's map (B, 64, 14, 14) and scores of background and person (B, 2, 56, 56)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ImageEncoderViT(
            img_size=SIDE, patch_size=PATCH, embed_dim=CHANNELS, depth=12, num_heads=3, out_chans=NECK,
            norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=7,
            global_attn_indexes=(2, 5, 8, 11),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Conv2d(NECK, NECK, 3, padding=1),
            nn.GELU(),
            nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False),
            nn.Conv2d(NECK, 2, 3, padding=1),
        )

    def forward(self, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """The neck's map and the scores."""
        features = self.encoder(images_bchw)
        return features, self.head(features)


def with_weights(path: Path) -> Segmenter:
    """The segmenter with a ViT's weights where its names fit. path: of timm's vit_tiny_patch16_224, safetensors."""
    torch.manual_seed(0)
    model, given = Segmenter(), load_file(path)
    encoder = model.encoder
    found = {name.replace("mlp.fc", "mlp.lin"): value for name, value in given.items() if name.startswith("blocks.")}
    found |= {name: value for name, value in given.items() if name.startswith("patch_embed.")}
    tokens = SIDE // PATCH
    found["pos_embed"] = given["pos_embed"][:, -tokens * tokens :].reshape(1, tokens, tokens, CHANNELS)
    missing, unexpected = encoder.load_state_dict(found, strict=False)
    if unexpected or any("rel_pos" not in name and "neck" not in name for name in missing):
        raise ValueError(f"{path} is no vit_tiny_patch16_224: {unexpected}, {missing}")
    for name, positions in encoder.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(positions, std=0.02)
    return model.eval()


def read(data: Path, part: str) -> tuple[Tensor, Tensor]:
    """Photographs (N, 3, 224, 224), normalized by 0.5, and where people are (N, 224, 224). part: "train" or "test"."""
    images, people = [], []
    for entry in json.loads((data / "annotations.json").read_text())[part]:
        image = Image.open(data / entry["image"]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        mask = Image.open(data / entry["mask"]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
        people.append(torch.from_numpy(np.array(mask) > 0))
    return torch.stack(images), torch.stack(people)


def train(model: Segmenter, images: Tensor, people: Tensor) -> None:
    """Neck and head, on tokens that are computed once; every fourth pixel says what is there."""
    wanted, entering = people[:, 2::4, 2::4].long(), list[Tensor]()
    hook = model.encoder.neck.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    with torch.no_grad():
        for part in images.split(BATCH):
            model.encoder(part)
    hook.remove()
    tokens, trained = torch.cat(entering), nn.Sequential(model.encoder.neck, model.head)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        chosen = random.choice(len(tokens), BATCH, replace=False)
        loss = functional.cross_entropy(trained(tokens[chosen]), wanted[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"trained: loss {float(loss.detach()):.3f}, {time.process_time():.0f} CPU s", flush=True)


def larger(scores_bkhw: Tensor) -> Tensor:
    """Scores at the size of the photographs."""
    return functional.interpolate(scores_bkhw, (SIDE, SIDE), mode="bilinear", align_corners=False)


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of the neck (N, 64, 14, 14) and scores (N, 2, 56, 56) of all images."""
    features, scores = zip(*(model(part) for part in images.split(BATCH)), strict=True)
    return torch.cat(features), torch.cat(scores)


def overlaps(scores_nkhw: Tensor, people_nhw: Tensor) -> Tensor:
    """Intersection over union in percent, the mean of background and person, of every photograph (N,)."""
    found, shares = larger(scores_nkhw).argmax(1).bool(), []
    for a, b in ((found, people_nhw), (~found, ~people_nhw)):
        shares.append((a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1).clamp_min(1))
    return 100 * torch.stack(shares).mean(0)


def main() -> None:
    """Train, then measure, print and keep one row for each method and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budgets", default="W8A8,W4A4")
    parser.add_argument("--images", type=int, default=16, help="of calibration, the first of the training photographs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = with_weights(options.weights)
    images, people = read(options.data, "train")
    train(model, images, people)
    asked, wanted = read(options.data, "test")
    features, scores = outputs(model, asked)
    in_float, rows = overlaps(scores, wanted), list[dict[str, Any]]()
    print(f"float: mIoU {mean_and_error(in_float)}", flush=True)
    for method in options.methods.split(","):
        started = time.process_time()
        session = Session(model, images[: options.images], objective="features", recipe=METHODS[method])
        for budget in options.budgets.split(","):
            compiled = session.compile(budget)
            seconds = time.process_time() - started
            lowered = compiled.lowered("auto")
            quantized_features, quantized_scores = outputs(lowered, asked)
            found = overlaps(quantized_scores, wanted)
            same = (quantized_scores.argmax(1) == scores.argmax(1)).flatten(1).double().mean(1)
            row = {
                "method": method, "budget": budget, "cpu_s": seconds, "execution": str(lowered.card["execution"]),
                "features": mean_and_error(relative_errors(quantized_features, features)),
                "cosine": mean_and_error(torch.cosine_similarity(quantized_features.flatten(1), features.flatten(1))),
                "same_pixels": mean_and_error(100 * same), "miou": mean_and_error(found),
                "difference": mean_and_error(found - in_float),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
            started = time.process_time()
            document = {
                "model": "segment-anything's ImageEncoderViT, ViT-tiny, and a head", "test_images": len(asked),
                "calibration_images": options.images, "seed": 0, "float_miou": mean_and_error(in_float), "rows": rows,
            }  # fmt: skip
            (RESULTS / "segmentation_sam_vit_tiny.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
