"""A quantized backbone in a detector of your own, whose code stays as it is.

    python examples/own_detector.py

The detector here is a small one of points: a timm Swin gives maps, a convolution scores every place, and the best
places are picked by their values, which no graph can do. Only the backbone is compiled, for two image sizes.
"""

import timm
import torch
from torch import Tensor, nn

import fxquant


class PointDetector(nn.Module):
    """Images (B, 3, H, W) to the places (row, column) of the best scores, for each image."""

    def __init__(self) -> None:
        super().__init__()
        small = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "out_indices": (0, 1), "window_size": 4}
        self.backbone = timm.create_model(
            "swin_tiny_patch4_window7_224", features_only=True, img_size=(32, 32), strict_img_size=False, **small
        )
        self.score = nn.Conv2d(32, 1, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        coarse = self.backbone(images)[-1].permute(0, 3, 1, 2)
        scores = self.score(coarse)[:, 0]
        return [torch.nonzero(found > found.mean() + found.std()) for found in scores]


torch.manual_seed(0)
detector = PointDetector().eval()
images = torch.rand(4, 3, 32, 32)
with torch.inference_mode():
    expected = detector(images), detector(torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)))

detector.backbone = fxquant.compile(
    detector.backbone, "W8A8", calibration=images, objective="features", recipe="mptq_vit", image_sizes=[(32, 48)]
)
print(detector.backbone.report().brief())
with torch.inference_mode():
    found = detector(images), detector(torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)))
same = [torch.equal(one, other) for pair in zip(found, expected, strict=True) for one, other in zip(*pair, strict=True)]
print(f"images with the same points: {sum(same)} of {len(same)}")
