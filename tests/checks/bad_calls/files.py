"""What reads and writes files, also damaged ones, and what runs models."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxquant
from fxquant.data.images import ImageData, load_images
from fxquant.data.models import load_model, load_weights
from fxquant.data.preprocessing import Preprocessing
from fxquant.measure.accuracy import evaluate
from fxquant.measure.timing import measure
from fxquant.session.sweep import Results
from passes.pipeline.progress import SilentProgress
from tests.checks.bad_calls.generator import ANYTHING, Endless, Entry, Good, unfit


def files(good: Good) -> list[Entry]:
    """What reads and writes files."""
    folder = good.folder
    pathless = [value for value in ANYTHING if not isinstance(value, str | Path)]
    missing = [*pathless, "", "a\0b", "x" * 300, folder / "missing" / "x", folder]
    unwritable = [*pathless, "", "a\0b", folder / "missing" / "m.svg", folder]
    sizes = ["2", 0, -1, True, 2.5, None, 99]
    return [
        Entry("load", fxquant.load, {"path": lambda: folder / "good.fxq"}, {
            "path": [*missing, folder / "good.npz"], "backend": ["gpu", *unfit(str)]}),
        Entry("Compiled.save", good.compiled.save, {}, {"path": unwritable}),
        Entry("Compiled.draw", good.compiled.draw, {}, {"path": [*unwritable, folder / "picture.png"]}),
        Entry("Compiled.lowered", good.compiled.lowered, {}, {"backend": ["gpu", "", *unfit(str)]}),
        Entry("Compiled.export_onnx", good.compiled.export_onnx, {"path": lambda: folder / "m.onnx"}, {
            "weight_type": ["int2", "", *unfit(str)], "runtime": ["tensorrt", *unfit(str)]}),
        Entry("ImageData.open", ImageData.open,
              {"path": lambda: folder / "good.npz", "preprocessing": lambda: good.preprocessing}, {
                  "path": [*missing[:-1], folder / "good.fxq"], "preprocessing": [*ANYTHING, Preprocessing],
                  "classes": [3, ["a", 3], [], ["a", "a"], folder / "missing.txt", "a\0b", True, [""]],
                  "labels": [3, folder / "missing.txt", "", ["a"], True]}),
        Entry("load_images", load_images,
              {"path": lambda: folder / "good.npz", "count": lambda: 1, "preprocessing": lambda: good.preprocessing}, {
                  "path": missing[:-1], "count": sizes, "seed": ["x", -1, 2**64, True, 2.5, None]}),
        Entry("load_weights", load_weights, {"model": lambda: good.model, "file": lambda: folder / "good.pt"}, {
            "file": missing, "model": [nn.Linear(2, 2), *unfit(nn.Module)]}),
        Entry("load_model", load_model, {"name": lambda: "vit_tiny_patch16_224"}, {
            "name": ["vit", "", *unfit(str)], "weights": [value for value in missing if value is not None],
            "num_classes": [0, -1, "3", True, 2.5, 10**12], "pretrained": [True], "checkpoint_path": ["x"]}),
        Entry("Results", Results, {}, {"path": [*[v for v in pathless if v is not None], folder / "good.npz", folder]}),
    ]  # fmt: skip


def models(good: Good) -> list[Entry]:
    """What runs models."""
    count = ["2", 0, -1, True, 2.5, None]
    model = [*unfit(nn.Module), nn.Conv2d(5, 1, 1), nn.Flatten(0)]
    progress = [Endless(), SilentProgress, *[value for value in ANYTHING if value is not None and value is not True]]
    unlabelled = ImageData("one", 1, lambda index: good.images[index])
    beyond = ImageData("one", 1, lambda index: good.images[index], torch.tensor([99]))
    return [
        Entry("evaluate", evaluate, {"model": lambda: good.model, "data": lambda: good.data}, {
            "model": model, "data": [*ANYTHING, unlabelled, beyond, ImageData], "batch_size": count,
            "limit": count[:-1], "progress": progress}),
        Entry("measure", measure,
              {"variants": lambda: {"a": good.model}, "images_bchw": lambda: good.images, "seconds": lambda: 0.0}, {
                  "variants": [{}, {"a": 3}, {3: good.model}, 3, None, [good.model]], "images_bchw": list(ANYTHING),
                  "threads": count, "seconds": ["1", -1, math.nan, None, True], "progress": progress}),
    ]  # fmt: skip


def damaged(good: Good) -> list[Entry]:
    """Files of which bytes are changed, lost or in the wrong place; some of them are as good as before."""
    seeds = range(10**6)

    def read_images(file: Path) -> None:
        list(ImageData.open(file, good.preprocessing).batches())

    def read_picture(file: Path) -> None:
        folder = file.parent / "pictures"
        folder.mkdir(exist_ok=True)
        file.replace(folder / file.name)
        try:
            list(ImageData.open(folder, good.preprocessing).batches())
        finally:
            (folder / file.name).unlink()

    def read_labels(file: Path) -> None:
        ImageData.open(good.folder, good.preprocessing, labels=file, classes=good.folder / "names.json")

    def read_classes(file: Path) -> None:
        labels = good.folder / "labels.csv"
        ImageData.open(good.folder, good.preprocessing, labels=labels, classes=file)

    def read_weights(file: Path) -> None:
        load_weights(copy.deepcopy(good.model), file)

    readers: dict[str, Callable[[Path], Any]] = {
        "good.npz": read_images, "packed.npz": read_images, "good.pt": read_weights, "good.safetensors": read_weights,
        "labels.csv": read_labels, "names.json": read_classes,
        **{f"good.{suffix}": read_picture for suffix in ("png", "jpg", "gif", "bmp", "webp", "tif", "ppm")},
    }  # fmt: skip

    def of(name: str, reader: Callable[[Path], Any]) -> Callable[[int], None]:
        content = (good.folder / name).read_bytes()

        def run(damage: int) -> None:
            file = good.folder / f"damaged_{name}"
            file.write_bytes(_changed(content, random.Random(damage)))
            reader(file)

        return run

    return [
        Entry(f"damaged {name}", of(name, reader), {}, {"damage": seeds}, may_pass=True)
        for name, reader in readers.items()
    ]


def _changed(content: bytes, draw: random.Random) -> bytes:
    """Bytes with one to four changes, most of them near the beginning or the end, where formats have their headers."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        near = min(len(found), draw.choice((64, 256, len(found))))
        place = draw.randrange(near) if draw.random() < 0.6 else len(found) - 1 - draw.randrange(near)
        kind = draw.choice(("flip", "set", "cut", "insert", "numbers"))
        if kind == "flip":
            found[place] ^= 1 << draw.randrange(8)
        elif kind == "set":
            found[place] = draw.choice((0, 255, 32, 45, 57))
        elif kind == "cut":
            del found[place : place + draw.choice((1, 16, len(found)))]
        elif kind == "insert":
            found[place:place] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 8))))
        else:
            found[place : place + 4] = draw.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"))
        if not found:
            break
    return bytes(found)
