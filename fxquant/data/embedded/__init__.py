"""The embedded model and data: a small real Vision Transformer that comes with the package.

A timm `VisionTransformer` (6 blocks, width 96, 3 heads, patch 4, 28 x 28 grey images, 10 classes, 0.68 M parameters)
trained on Fashion-MNIST by `benchmarks/train_embedded_model.py`, 512 training images for calibration and the first
2,000 test images. Data, licence, recipe and float accuracy: `CARD.md` beside this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from fxquant.errors import DataError

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "vit_fashion_mnist.safetensors"
CALIBRATION = FOLDER / "calibration.npz"
TEST = FOLDER / "test.npz"
CARD = FOLDER / "card.json"
MEAN, STD = 0.2860, 0.3530


def normalize(images_nhw: np.ndarray) -> torch.Tensor:
    """Turn grey uint8 images (N, 28, 28) into the model's float32 input (N, 1, 28, 28)."""
    return ((torch.from_numpy(images_nhw.astype(np.float32)) / 255 - MEAN) / STD)[:, None]


def build() -> VisionTransformer:
    """The architecture with random weights."""
    return VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=96, depth=6, num_heads=3, weight_init="jax"
    )


def load_model() -> VisionTransformer:
    """The trained model, in eval mode."""
    model = build()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def calibration_images(count: int = 32) -> torch.Tensor:
    """The first `count` of 512 training images, float32 (count, 1, 28, 28); no labels, calibration needs none.

    Raises DataError where there are not that many.
    """
    with np.load(CALIBRATION) as data:
        return normalize(_first(data["images"], count, "calibration images", " (--images)"))


def test_images(count: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` of 2,000 test images, float32 (count, 1, 28, 28), and their labels, int64 (count,).

    Raises DataError where there are not that many.
    """
    with np.load(TEST) as data:
        images = _first(data["images"], count, "test images")
        return normalize(images), torch.from_numpy(data["labels"][:count].astype(np.int64))


def _first(images: np.ndarray, count: int, what: str, option: str = "") -> np.ndarray:
    if not 1 <= count <= len(images):
        raise DataError(f"there are {len(images)} embedded {what}, not {count}: ask for fewer{option}")
    return images[:count]
