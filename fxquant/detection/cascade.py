"""Cascade R-CNN (Cai and Vasconcelos, 2018): heads in a row, each of which cuts regions where the one before saw boxes.

Scores are the mean over the stages, boxes are the last stage's; with masks, those of all stages are averaged. Deltas
are of each class or of all classes together, then of the class that the stage finds most likely. Deliberately not done:
training, which needs overlaps of its own at each stage; load what was trained elsewhere (`fxquant.detection.mmdet`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.boxes import clip_boxes_to_image

from fxquant.detection.backbones import Backbone, timm_backbone
from fxquant.detection.models import BOX_PIXELS, MASK_PIXELS, anchors, map_names
from fxquant.errors import ModelError

DELTA_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""What deltas of each stage are divided by: later stages move boxes less."""


class CascadeRoIHeads(RoIHeads):  # type: ignore[misc]
    """The stages, in the place of torchvision's RoIHeads; in inference mode only.

    Args:
        pools: of each stage, what cuts features of regions.
        stages: of each, features (N, C, h, w) to class scores (N, classes) and deltas (N, 4) or (N, 4 classes).
        mask_pool: what cuts features for masks.
        mask_stages: of each stage, features to masks (N, classes, h, w); none where there are no masks.
        **options: of RoIHeads: score_thresh, nms_thresh, detections_per_img.
    """

    def __init__(
        self,
        pools: Sequence[nn.Module],
        stages: Sequence[nn.Module],
        mask_pool: nn.Module | None = None,
        mask_stages: Sequence[nn.Module] = (),
        **options: Any,
    ) -> None:
        training = {"fg_iou_thresh": 0.5, "bg_iou_thresh": 0.5, "batch_size_per_image": 512, "positive_fraction": 0.25}
        super().__init__(None, None, None, **training, bbox_reg_weights=DELTA_WEIGHTS[-1], **options)
        self.pools, self.stages = nn.ModuleList(pools), nn.ModuleList(stages)
        self.mask_pool, self.mask_stages = mask_pool, nn.ModuleList(mask_stages)
        self.coders = [BoxCoder(weights) for weights in DELTA_WEIGHTS]

    def paths(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Each head's kind, its pool, and what reads its features, by their paths in the detector."""
        found: list[tuple[str, str, tuple[str, ...]]] = []
        found += [("box", f"roi_heads.pools.{i}", (f"roi_heads.stages.{i}",)) for i in range(len(self.stages))]
        stages = range(len(self.mask_stages))
        return found + [("mask", "roi_heads.mask_pool", (f"roi_heads.mask_stages.{i}",)) for i in stages]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Any = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Boxes, labels, scores and perhaps masks of each image, and no losses.

        Args:
            features: maps by name.
            proposals: of each image, (N, 4).
            image_shapes: height and width of each image in the batch.
            targets: must be None.

        Raises ModelError in training mode.
        """
        if self.training:
            raise ModelError("a cascade is not trained here: call detector.eval(), and load trained weights")
        regions, scores = proposals, []
        for pool, stage, coder in zip(self.pools, self.stages, self.coders, strict=True):
            found = regions
            logits, deltas = stage(pool(features, found, image_shapes))
            scores.append(logits.softmax(-1))
            boxes = coder.decode(_of_likeliest(deltas, logits), found)[:, 0].split([len(each) for each in found])
            regions = [clip_boxes_to_image(each, size) for each, size in zip(boxes, image_shapes, strict=True)]
        mean = torch.stack(scores).mean(0).log()
        of_each_class = deltas if deltas.shape[1] > 4 else deltas.repeat(1, mean.shape[1])
        rows = zip(*self.postprocess_detections(mean, of_each_class, found, image_shapes), strict=True)
        result = [{"boxes": boxes, "labels": labels, "scores": score} for boxes, score, labels in rows]
        if len(self.mask_stages) and self.mask_pool is not None:
            cut = self.mask_pool(features, [each["boxes"] for each in result], image_shapes)
            labels = [each["labels"] for each in result]
            stages = [maskrcnn_inference(stage(cut), labels) for stage in self.mask_stages]
            for each, masks in zip(result, zip(*stages, strict=True), strict=True):
                each["masks"] = torch.stack(masks).mean(0)
        return result, {}


def _of_likeliest(deltas: Tensor, logits: Tensor) -> Tensor:
    """Deltas (N, 4) of the class that is likeliest, "nothing" left out; those of all classes as they are."""
    if deltas.shape[1] == 4:
        return deltas
    likeliest = logits[:, 1:].argmax(1) + 1
    return deltas.reshape(len(deltas), -1, 4)[torch.arange(len(deltas)), likeliest]


class AgnosticPredictor(nn.Module):
    """Class scores, and deltas that are the same for all classes.

    Args:
        channels: of a region's features.
        classes: with the one for "nothing".
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(channels, classes), nn.Linear(channels, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, channels) to scores (N, classes) and deltas (N, 4)."""
        return self.cls_score(features), self.bbox_pred(features)


def cascade_rcnn(
    backbone: str | Backbone, classes: int, hidden: int = 1024, convolutions: int = 0, masks: int = 0,
    agnostic: bool = True, **options: Any,
) -> FasterRCNN:  # fmt: skip
    """Cascade (Mask) R-CNN of three stages, random weights, in inference mode.

    Args:
        backbone: a name for `timm_backbone`, or a backbone.
        classes: kinds of objects, and one for "nothing", which is number 0.
        hidden: width of the box heads.
        convolutions: of each box head, before one linear layer; 0: two linear layers.
        masks: convolutions of each mask head; 0: there are none.
        agnostic: whether deltas are the same for all classes.
        **options: of `torchvision.models.detection.FasterRCNN`, such as min_size, fixed_size, image_mean.
    """
    found = timm_backbone(backbone) if isinstance(backbone, str) else backbone
    names, channels = map_names(found), found.out_channels
    stages, mask_stages = [], []
    for _ in DELTA_WEIGHTS:
        size = (channels, BOX_PIXELS, BOX_PIXELS)
        head = (
            FastRCNNConvFCHead(size, [channels] * convolutions, [hidden], nn.BatchNorm2d)
            if convolutions
            else TwoMLPHead(channels * BOX_PIXELS**2, hidden)
        )
        predictor = (AgnosticPredictor if agnostic else FastRCNNPredictor)(hidden, classes)
        stages.append(nn.Sequential(head, predictor))
        if masks:
            convs = MaskRCNNHeads(channels, (channels,) * masks, 1)
            mask_stages.append(nn.Sequential(convs, MaskRCNNPredictor(channels, channels, classes)))
    detector = FasterRCNN(found, classes, rpn_anchor_generator=anchors(found), **options)
    own = detector.roi_heads
    detector.roi_heads = CascadeRoIHeads(
        [MultiScaleRoIAlign(names, BOX_PIXELS, sampling_ratio=2) for _ in stages],
        stages,
        MultiScaleRoIAlign(names, MASK_PIXELS, sampling_ratio=2) if masks else None,
        mask_stages,
        score_thresh=own.score_thresh, nms_thresh=own.nms_thresh, detections_per_img=own.detections_per_img,
    )  # fmt: skip
    return detector.eval()
