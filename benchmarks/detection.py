"""Two small detectors, trained here and quantized by every method: box and mask AP under float's.

    python benchmarks/detection.py train penn_fudan --data DATA --weights DEIT.safetensors --checkpoint PF.pt
    python benchmarks/detection.py train bccd --data DATA --checkpoint BCCD.pt
    python benchmarks/detection.py measure penn_fudan --data DATA --checkpoint PF.pt

DATA has the folders `penn_fudan` (170 photographs with pedestrians, boxes and masks) and `bccd` (364 microscope images
with three kinds of blood cells), each with annotations.json: {"train": [{"image", "mask", "size", "boxes_xyxy",
"labels"}, ...], "test": ...}.

- penn_fudan: Mask R-CNN, a ViT-tiny whose weights are given (5.7 million parameters), 224 x 224.
- bccd: Faster R-CNN, a Swin of 48 channels and 2, 2, 4 blocks, trained from nothing, 192 x 256.

Training takes 3 to 5 minutes of one core each. Results go to benchmarks/results/detection_SET.json after every row, so
that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from fxquant.artefact.cache import signature
from fxquant.detection.average_precision import average_precision
from fxquant.detection.backbones import timm_backbone
from fxquant.detection.coco import CocoImages, pycocotools
from fxquant.detection.models import faster_rcnn, mask_rcnn
from fxquant.detection.session import DetectorSession
from fxquant.session.sweep import Results
from passes.recipes.adalog import adalog, repq_vit
from passes.recipes.best import best, best_thorough
from passes.recipes.lampq import lampq
from passes.recipes.mix_qvit import mix_qvit
from passes.recipes.mptq_vit import mptq_vit, naive_min_max, tsptq_vit

RESULTS = Path(__file__).parent / "results"
KINDS = {"penn_fudan": ["pedestrian"], "bccd": ["RBC", "WBC", "Platelets"]}
EPOCHS = {"penn_fudan": 6, "bccd": 4}
RATES = {"penn_fudan": (5e-5, 3e-4), "bccd": (4e-4, 4e-4)}  # of the backbone's body, and of all else
BATCH, WARM_UP, DECAY = 2, 100, 0.05
METHODS: dict[str, Any] = {
    "best": best,
    "naive_min_max": naive_min_max,
    "mptq_vit": mptq_vit,
    "repq_vit": repq_vit,
    "tsptq_vit": tsptq_vit,
    "adalog": adalog,
    "lampq": lampq,
    "mix_qvit": partial(mix_qvit, importance="none"),  # relevance is of one class of an image, which nothing here has
    "best_thorough": best_thorough,
}


def build(name: str) -> Any:
    """The detector of one set, random weights."""
    options = {"rpn_batch_size_per_image": 128, "rpn_pre_nms_top_n_train": 1000, "rpn_post_nms_top_n_train": 300}
    options |= {"rpn_pre_nms_top_n_test": 500, "rpn_post_nms_top_n_test": 200}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if name == "penn_fudan":
        vit = timm_backbone("vit_tiny_patch16_224", 96, img_size=224)
        heads = {"hidden": 256, "mask_channels": 64, "mask_layers": 2, "box_batch_size_per_image": 64}
        return mask_rcnn(vit, 2, fixed_size=(224, 224), **heads, **half, **options)
    small = {"embed_dim": 48, "depths": (2, 2, 4), "num_heads": (2, 4, 8), "out_indices": (0, 1, 2)}
    swin = timm_backbone("swin_tiny_patch4_window7_224", 96, img_size=(192, 256), drop_path_rate=0.0, **small)
    return faster_rcnn(swin, 4, hidden=256, fixed_size=(192, 256), box_batch_size_per_image=128, **half, **options)


def read(data: Path, name: str, part: str) -> CocoImages:
    """One part of a set, as COCO would have it."""
    folder = data / name
    entries = json.loads((folder / "annotations.json").read_text())[part]
    images, annotations = [], []
    for image_id, entry in enumerate(entries, start=1):
        width, height = entry["size"]
        images.append({"id": image_id, "file_name": entry["image"], "width": width, "height": height})
        masks = _masks(folder / entry["mask"], len(entry["labels"])) if "mask" in entry else [{}] * len(entry["labels"])
        for (x1, y1, x2, y2), label, mask in zip(entry["boxes_xyxy"], entry["labels"], masks, strict=True):
            if x2 <= x1 or y2 <= y1:
                continue
            found = {"id": len(annotations) + 1, "image_id": image_id, "category_id": KINDS[name].index(label) + 1}
            found |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            annotations.append({**found, **mask})
    kinds = [{"id": index, "name": kind} for index, kind in enumerate(KINDS[name], start=1)]
    document = {"images": images, "annotations": annotations, "categories": kinds}
    return CocoImages.of(document, folder, f"{name} {part}")


def _masks(path: Path, count: int) -> list[dict[str, Any]]:
    """Of a picture with one number for each person."""
    numbers = np.array(Image.open(path))
    encode = pycocotools("mask").encode
    codes = [encode(np.asfortranarray((numbers == person).astype(np.uint8))) for person in range(1, count + 1)]
    return [{"segmentation": code, "area": int((numbers == p).sum())} for p, code in enumerate(codes, start=1)]


def train(name: str, data: Path, weights: Path | None, checkpoint: Path) -> None:
    """Train a detector; the checkpoint is written after every epoch, and training goes on from it."""
    torch.manual_seed(0)
    model = build(name)
    if weights is not None:
        body = model.backbone.body
        found = checkpoint_filter_fn(load_file(weights), body)
        print(body.load_state_dict({k: v for k, v in found.items() if not k.startswith("head")}, strict=False))
    images = read(data, name, "train")
    slow, fast = RATES[name]
    body = {id(p) for p in model.backbone.body.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in body], "rate": slow},
        {"params": [p for p in model.parameters() if id(p) not in body], "rate": fast},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    steps = math.ceil(len(images) / BATCH) * EPOCHS[name]
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epochs"]
    for epoch in range(first, EPOCHS[name]):
        model.train()
        losses = []
        for step, batch in enumerate(_batches(images, epoch, name == "penn_fudan")):
            done = epoch * math.ceil(len(images) / BATCH) + step
            factor = min(1.0, (done + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * done / steps))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * factor
            loss = sum(model(*batch).values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
        torch.save(state, checkpoint)
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, {time.process_time():.0f} CPU s", flush=True)
    model.eval()
    print({kind: str(found) for kind, found in average_precision(model, read(data, name, "test")).items()})


def _batches(images: CocoImages, epoch: int, masks: bool) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Pictures with their objects in a random order, every second one mirrored."""
    random = np.random.default_rng(epoch)
    for indices in np.array_split(random.permutation(len(images)), math.ceil(len(images) / BATCH)):
        pairs = [(images.image(i), images.target(i, masks)) for i in indices]
        pairs = [_mirrored(*pair) if random.random() < 0.5 else pair for pair in pairs]
        yield [image for image, _ in pairs], [target for _, target in pairs]


def _mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    width = image.shape[2]
    found = {**target, "boxes": torch.stack([width - x2, y1, width - x1, y2], 1)}
    if "masks" in target:
        found["masks"] = target["masks"].flip(2)
    return image.flip(2), found


def trained(name: str, checkpoint: Path) -> Any:
    """The detector of a checkpoint, in inference mode."""
    model = build(name)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model.eval()


def measure(name: str, data: Path, checkpoint: Path, methods: list[str], budgets: list[str], images: int) -> None:
    """AP of the float detector and of every method at every budget, in points under float on the same images."""
    model = trained(name, checkpoint)
    calibration, test = read(data, name, "train").images(images), read(data, name, "test")
    results = Results(RESULTS / f"detection_{name}.json")
    weights = signature(model)

    def precision(detector: nn.Module) -> dict[str, Any]:
        return {kind: found.to_dict() for kind, found in average_precision(detector, test).items()}

    baseline = results.point(f"float {weights}", lambda: {"method": "float", "precision": precision(model)})
    print("float", {kind: round(found["ap"], 1) for kind, found in baseline["precision"].items()}, flush=True)
    for method in methods:
        session: DetectorSession | None = None
        for budget in budgets:

            def make(method: str = method, budget: str = budget) -> dict[str, Any]:
                nonlocal session
                started = time.process_time()
                session = session or DetectorSession(model, calibration, recipe=METHODS[method])
                detector = session.compile(budget)
                seconds = time.process_time() - started
                totals = detector.report().totals.to_dict()
                made = {"method": method, "budget": budget, "calibration_images": images, "cpu_s": seconds}
                return {**made, "precision": precision(detector), **totals}

            point = results.point(f"{method} {budget} {images} {weights}", make)
            shown = {}
            for kind, found in point["precision"].items():
                pairs = np.subtract(baseline["precision"][kind]["resampled"], found["resampled"])
                drop = baseline["precision"][kind]["ap"] - found["ap"]
                shown[kind] = f"{found['ap']:.1f}, {drop:.1f} +- {pairs.std(ddof=1):.1f} under float"
            print(method, budget, shown, flush=True)


def main() -> None:
    """Train or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "measure"])
    parser.add_argument("set", choices=list(KINDS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of the ViT that training starts from")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budgets", default="W6A6,W4A4,W3A3")
    parser.add_argument("--images", type=int, default=32, help="of calibration, the first of the training images")
    arguments = parser.parse_args()
    if arguments.command == "train":
        train(arguments.set, arguments.data, arguments.weights, arguments.checkpoint)
    else:
        methods, budgets = arguments.methods.split(","), arguments.budgets.split(",")
        measure(arguments.set, arguments.data, arguments.checkpoint, methods, budgets, arguments.images)


if __name__ == "__main__":
    main()
