"""A plain Vision Transformer for models to be made of."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, num_heads=2, depth=1, num_classes=5, proj_drop_rate=0.1
    ).eval()
