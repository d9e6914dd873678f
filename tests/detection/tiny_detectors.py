"""Detectors of a few thousand weights, and one of them quantized once a process."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fxquant.detection.backbones import Backbone, timm_backbone
from fxquant.detection.cascade import cascade_rcnn
from fxquant.detection.compiled_detector import CompiledDetector
from fxquant.detection.models import mask_rcnn
from fxquant.detection.session import DetectorSession

REGIONS = 4
SIZES: dict[str, Any] = {"min_size": 32, "max_size": 64}


def backbone() -> Backbone:
    """A Swin of two blocks, random weights."""
    torch.manual_seed(0)
    small = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "out_indices": (0, 1)}
    return timm_backbone("swin_tiny_patch4_window7_224", 8, img_size=(32, 32), window_size=4, **small)


def tiny_mask_rcnn() -> Any:
    return mask_rcnn(backbone(), 3, hidden=16, mask_channels=8, mask_layers=1, **SIZES)


def tiny_cascade(**options: Any) -> Any:
    return cascade_rcnn(backbone(), 3, hidden=16, **SIZES, **options)


def pictures(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 40, 40, generator=generator) for _ in range(count)]


@functools.cache
def tiny_session() -> DetectorSession:
    options: Any = {"recipe": "naive_min_max", "image_sizes": [(32, 64)], "bits": (4, 8)}
    return DetectorSession(tiny_mask_rcnn(), pictures(), REGIONS, **options)


@functools.cache
def tiny_compiled(budget: str = "W8A8") -> CompiledDetector:
    return tiny_session().compile(budget)
