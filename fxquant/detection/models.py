"""torchvision's Faster and Mask R-CNN on the backbones of `fxquant.detection.backbones`.

    detector = mask_rcnn("swin_tiny_patch4_window7_224", classes=81)       # as in the papers; 80 kinds and "nothing"

What torchvision makes of its own is not changed: anchors of one size for each map, aspects 1:2, 1:1 and 2:1, heads of
two linear layers and of four convolutions.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from fxquant.detection.backbones import Backbone, PyramidBackbone, timm_backbone

ANCHOR_SIDE = 8  # sides of an anchor in pixels of its map
ASPECTS = (0.5, 1.0, 2.0)
BOX_PIXELS, MASK_PIXELS = 7, 14  # of a region's features, along one side


def faster_rcnn(backbone: str | Backbone, classes: int, hidden: int = 1024, **options: Any) -> FasterRCNN:
    """Faster R-CNN (Ren et al., 2015) with a feature pyramid, random weights, in inference mode.

    Args:
        backbone: a name for `timm_backbone`, or a backbone.
        classes: kinds of objects, and one for "nothing", which is number 0.
        hidden: width of the box head.
        **options: of `torchvision.models.detection.FasterRCNN`, such as min_size, fixed_size, image_mean.
    """
    found = timm_backbone(backbone) if isinstance(backbone, str) else backbone
    return FasterRCNN(found, **{**box_parts(found, classes, hidden), **options}).eval()


def mask_rcnn(
    backbone: str | Backbone, classes: int, hidden: int = 1024, mask_channels: int = 256, mask_layers: int = 4,
    **options: Any,
) -> MaskRCNN:  # fmt: skip
    """Mask R-CNN (He et al., 2017) with a feature pyramid, random weights, in inference mode.

    Args:
        backbone: a name for `timm_backbone`, or a backbone.
        classes: kinds of objects, and one for "nothing", which is number 0.
        hidden: width of the box head.
        mask_channels: of the mask head.
        mask_layers: convolutions of the mask head.
        **options: of `torchvision.models.detection.MaskRCNN`, such as min_size, fixed_size, image_mean.
    """
    found = timm_backbone(backbone) if isinstance(backbone, str) else backbone
    parts = {**box_parts(found, classes, hidden), **mask_parts(found, classes, mask_channels, mask_layers)}
    return MaskRCNN(found, **{**parts, **options}).eval()


def map_names(backbone: Backbone) -> list[str]:
    """The maps that regions are cut from; anchors have one more, where there is a coarser one."""
    return [str(index) for index in range(len(backbone.reductions))]


def anchors(backbone: Backbone) -> AnchorGenerator:
    """One size for every map of the pyramid."""
    strides = list(backbone.reductions)
    if isinstance(backbone, PyramidBackbone):
        strides.append(strides[-1] * 2)
    return AnchorGenerator(tuple((ANCHOR_SIDE * stride,) for stride in strides), (ASPECTS,) * len(strides))


def box_parts(backbone: Backbone, classes: int, hidden: int) -> dict[str, Any]:
    """Arguments of `FasterRCNN`: what makes boxes of maps.

    Args:
        backbone: whose maps they read.
        classes: with the one for "nothing".
        hidden: width of the box head.
    """
    return {
        "rpn_anchor_generator": anchors(backbone),
        "box_roi_pool": MultiScaleRoIAlign(map_names(backbone), BOX_PIXELS, sampling_ratio=2),
        "box_head": TwoMLPHead(backbone.out_channels * BOX_PIXELS**2, hidden),
        "box_predictor": FastRCNNPredictor(hidden, classes),
    }


def mask_parts(backbone: Backbone, classes: int, channels: int, layers: int) -> dict[str, nn.Module]:
    """Arguments of `MaskRCNN` besides those of boxes.

    Args:
        backbone: whose maps they read.
        classes: with the one for "nothing".
        channels: of the mask head.
        layers: of the mask head.
    """
    return {
        "mask_roi_pool": MultiScaleRoIAlign(map_names(backbone), MASK_PIXELS, sampling_ratio=2),
        "mask_head": MaskRCNNHeads(backbone.out_channels, (channels,) * layers, 1),
        "mask_predictor": MaskRCNNPredictor(channels, channels, classes),
    }
