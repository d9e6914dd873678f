"""A segmenter as one model: a timm Swin under SegFormer's head (Xie et al., 2021), every layer quantized.

    python examples/segmenter.py

Weights are random, so that what is measured is agreement with the float model: the share of pixels that get the same
class, and the mean over classes of intersection over union, with the float model's classes in the place of labels.
"""

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant


class Segmenter(nn.Module):
    """Images (B, 3, H, W) to scores of classes at a quarter of the size, (B, classes, H / 4, W / 4)."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        small = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "out_indices": (0, 1), "window_size": 4}
        self.backbone = timm.create_model(
            "swin_tiny_patch4_window7_224", features_only=True, img_size=(32, 32), **small
        )
        channels = self.backbone.feature_info.channels()
        self.sides = nn.ModuleList(nn.Conv2d(entering, width, 1) for entering in channels)
        self.fuse = nn.Sequential(nn.Conv2d(width * len(channels), width, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.classes = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = [side(found.permute(0, 3, 1, 2)) for side, found in zip(self.sides, self.backbone(images), strict=True)]
        size = maps[0].shape[2:]
        maps = [functional.interpolate(found, size, mode="bilinear", align_corners=False) for found in maps]
        return self.classes(self.fuse(torch.cat(maps, 1)))


torch.manual_seed(0)
model = Segmenter(classes=5).eval()
images = torch.rand(8, 3, 32, 32)
quantized = fxquant.compile(model, "W6A6", calibration=images[:4], objective="features", recipe="mptq_vit")
print(quantized.report().brief())
with torch.inference_mode():
    expected, found = model(images[4:]).argmax(1), quantized(images[4:]).argmax(1)
classes = expected.unique()
overlaps = [((expected == c) & (found == c)).sum() / ((expected == c) | (found == c)).sum() for c in classes]
print(f"pixels of the same class: {float((expected == found).float().mean()):.0%}")
print(f"mIoU against the float model: {100 * float(torch.stack(overlaps).mean()):.1f}")
