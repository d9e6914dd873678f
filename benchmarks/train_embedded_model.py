"""Train the embedded model and write the embedded data (run once by a maintainer; half an hour on one core).

Data: Fashion-MNIST (MIT), from Debian's package `dataset-fashion-mnist`.
Result: `fxquant/data/embedded/` gets the weights, 512 calibration images, 2,000 test images and the card's numbers.

    apt-get install dataset-fashion-mnist
    python benchmarks/train_embedded_model.py
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import fxquant.data.embedded as embedded

CALIBRATION_COUNT = 512
TEST_COUNT = 2000


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file: uint8 images (N, 28, 28) or labels (N,)."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, 4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def flip(images_bchw: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror every other image (by its own draw) of a float batch (B, 1, 28, 28)."""
    mirrored = torch.rand(len(images_bchw), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images_bchw.flip(3), images_bchw)


@torch.no_grad()
def count_correct(model: torch.nn.Module, images_nchw: torch.Tensor, labels_n: torch.Tensor) -> int:
    """Number of images whose arg-max is the label."""
    pairs = zip(images_nchw.split(500), labels_n.split(500), strict=True)
    return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pairs)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--matrix-learning-rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    train_images = read_idx(options.data / "train-images-idx3-ubyte.gz")
    train_labels = read_idx(options.data / "train-labels-idx1-ubyte.gz")
    test_images = read_idx(options.data / "t10k-images-idx3-ubyte.gz")
    test_labels = read_idx(options.data / "t10k-labels-idx1-ubyte.gz")
    x_train, y_train = embedded.normalize(train_images), torch.from_numpy(train_labels.astype(np.int64))
    x_test, y_test = embedded.normalize(test_images), torch.from_numpy(test_labels.astype(np.int64))

    chosen = np.sort(np.random.default_rng(options.seed).choice(len(train_images), CALIBRATION_COUNT, replace=False))
    np.savez_compressed(embedded.CALIBRATION, images=train_images[chosen], labels=train_labels[chosen])
    np.savez_compressed(embedded.TEST, images=test_images[:TEST_COUNT], labels=test_labels[:TEST_COUNT])

    model = embedded.build().train()
    # Muon on the blocks' matrices learns this small model several times faster than AdamW alone.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and name.startswith("blocks"))]
    optimizers = [
        torch.optim.Muon(matrices, lr=options.matrix_learning_rate, weight_decay=0.02),
        torch.optim.AdamW(others, lr=options.learning_rate, weight_decay=0.02),
    ]
    steps = len(x_train) // options.batch
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, o.param_groups[0]["lr"], total_steps=steps * options.epochs, pct_start=0.05, cycle_momentum=False
        )
        for o in optimizers
    ]
    for epoch in range(options.epochs):
        start, total = time.time(), 0.0
        order = torch.randperm(len(x_train), generator=generator)
        for step in range(steps):
            index = order[step * options.batch : (step + 1) * options.batch]
            loss = cross_entropy(model(flip(x_train[index], generator)), y_train[index], label_smoothing=0.05)
            model.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            total += loss.item()
        model.eval()
        correct = count_correct(model, x_test, y_test)
        embedded.FOLDER.mkdir(exist_ok=True)
        save_file(model.state_dict(), embedded.WEIGHTS)
        model.train()
        print(
            f"epoch {epoch}: loss {total / steps:.4f}, test {correct / 100:.2f} %, {time.time() - start:.0f} s",
            flush=True,
        )

    model.eval()
    shipped = count_correct(model, x_test[:TEST_COUNT], y_test[:TEST_COUNT])
    card = {
        "float_top1_shipped": 100 * shipped / TEST_COUNT,
        "float_top1_all_10000": count_correct(model, x_test, y_test) / 100,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": {key: str(value) for key, value in vars(options).items() if key != "data"},
    }
    embedded.CARD.write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
