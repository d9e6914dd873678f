"""Feature pyramids on timm's Vision Transformers, as torchvision's detectors take them: images in, maps by name out.

Two kinds: a backbone of several resolutions, such as Swin, under a Feature Pyramid Network (Lin et al., 2017); and a
plain ViT under a simple feature pyramid (ViTDet, Li et al., 2022), which makes all maps of the last one. Every map of a
Swin passes a LayerNorm of its own before the pyramid, as in Swin's published detectors.

No weights are downloaded: load a checkpoint into `backbone.body`, or all of a detector's (`fxquant.detection.mmdet`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from fxquant.errors import ModelError


class PyramidBackbone(nn.Module):
    """A timm model of several resolutions, such as Swin, a LayerNorm on each of its maps, and a pyramid network.

    Args:
        body: what `timm.create_model(..., features_only=True)` returns.
        channels: of every map of the pyramid.

    forward: float images (B, C, H, W) to maps (B, channels, h, w) by name: "0" is the finest, "pool" the coarsest.
    """

    def __init__(self, body: nn.Module, channels: int = 256) -> None:
        super().__init__()
        info: Any = body.feature_info
        self.body = body
        self._is_last = getattr(body, "output_fmt", "NCHW") == "NHWC"
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in info.channels())
        self.fpn = FeaturePyramidNetwork(info.channels(), channels, LastLevelMaxPool())
        self.out_channels = channels
        self.reductions = tuple(info.reduction())

    def forward(self, images_bchw: Tensor) -> OrderedDict[str, Tensor]:
        """See the class."""
        maps = self.body(images_bchw)
        if not self._is_last:
            maps = [found.permute(0, 2, 3, 1) for found in maps]
        normed = [norm(found).permute(0, 3, 1, 2) for norm, found in zip(self.norms, maps, strict=True)]
        pyramid: OrderedDict[str, Tensor] = self.fpn(OrderedDict((str(i), found) for i, found in enumerate(normed)))
        return pyramid


class ViTBackbone(nn.Module):
    """A plain timm ViT and a simple feature pyramid of its last map: twice as fine, the same, half as fine.

    Args:
        body: a timm ViT without pooling or head, of a fixed image size.
        channels: of every map of the pyramid.

    forward: float images (B, C, H, W) to maps (B, channels, h, w) by name, "0" the finest.
    """

    def __init__(self, body: nn.Module, channels: int = 256) -> None:
        super().__init__()
        vit: Any = body
        width, self.out_channels = vit.embed_dim, channels
        self.body = body
        self.finer = nn.ConvTranspose2d(width, width // 2, 2, 2)
        self.coarser = nn.MaxPool2d(2)
        self.sides = nn.ModuleList(_side(entering, channels) for entering in (width // 2, width, width))
        patch = vit.patch_embed.patch_size[0]
        self.reductions = (patch // 2, patch, patch * 2)

    def forward(self, images_bchw: Tensor) -> OrderedDict[str, Tensor]:
        """See the class."""
        vit: Any = self.body
        (found,) = vit.forward_intermediates(images_bchw, indices=1, norm=True, intermediates_only=True)
        maps = (self.finer(found), found, self.coarser(found))
        return OrderedDict((str(i), side(x)) for i, (side, x) in enumerate(zip(self.sides, maps, strict=True)))


def _side(channels_in: int, channels: int) -> nn.Sequential:
    """What every map of a simple feature pyramid passes, as in ViTDet."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


Backbone = PyramidBackbone | ViTBackbone


def timm_backbone(name: str, channels: int = 256, **options: Any) -> Backbone:
    """A backbone on a timm architecture, with random weights.

    Args:
        name: timm's, such as "swin_tiny_patch4_window7_224" or "vit_base_patch16_224".
        channels: of every map of the pyramid.
        **options: of `timm.create_model`, such as img_size, embed_dim, depths.

    Raises ModelError where timm has no such model or it takes other options, and where it is neither of several
    resolutions nor a plain ViT.
    """
    if not timm.is_model(name):
        raise ModelError(f"no timm model is called {name!r}")
    if "swin" in name:  # images of every size, of which windows are padded
        options = {"strict_img_size": False, **options}
    if "vit" in name or "deit" in name:
        body = _created(name, num_classes=0, global_pool="", **options)
        if not hasattr(body, "forward_intermediates") or not hasattr(body, "embed_dim"):
            raise ModelError(f"{name} is no plain ViT whose last map is known")
        return ViTBackbone(body, channels)
    body = _created(name, features_only=True, **options)
    reductions = list(body.feature_info.reduction())
    if reductions != sorted(set(reductions)):
        raise ModelError(f"the maps of {name} are not of several resolutions, but {reductions} pixels a step")
    return PyramidBackbone(body, channels)


def _created(name: str, **options: Any) -> Any:
    try:
        return timm.create_model(name, **options)
    except Exception as error:  # whatever a constructor raises for an option that it does not take
        raise ModelError(f"{name} cannot be built with {options}: {error}") from error
