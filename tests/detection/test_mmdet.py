"""Weights by mmdetection's names, made from a detector's own."""

import re

import pytest
import torch
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn
from torch.nn import functional

from fxquant.detection.mmdet import from_mmdet
from fxquant.errors import ModelError
from tests.detection.tiny_detectors import tiny_cascade, tiny_mask_rcnn

pytestmark = pytest.mark.quick
_THEIRS = [
    (r"backbone\.body\.layers_(\d)\.blocks\.(\d)\.attn\.", r"backbone.stages.\1.blocks.\2.attn.w_msa."),
    (r"backbone\.body\.layers_(\d)\.blocks\.(\d)\.mlp\.fc1\.", r"backbone.stages.\1.blocks.\2.ffn.layers.0.0."),
    (r"backbone\.body\.layers_(\d)\.blocks\.(\d)\.mlp\.fc2\.", r"backbone.stages.\1.blocks.\2.ffn.layers.1."),
    (r"backbone\.body\.layers_(\d)\.blocks\.(\d)\.norm", r"backbone.stages.\1.blocks.\2.norm"),
    (r"backbone\.body\.layers_1\.downsample\.", r"backbone.stages.0.downsample."),
    (r"backbone\.body\.patch_embed\.proj\.", "backbone.patch_embed.projection."),
    (r"backbone\.body\.patch_embed\.norm\.", "backbone.patch_embed.norm."),
    (r"backbone\.norms\.(\d)\.", r"backbone.norm\1."),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"roi_heads\.mask_head\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
    (r"roi_heads\.stages\.(\d)\.0\.0\.0\.", r"roi_head.bbox_head.\1.shared_convs.0.conv."),
    (r"roi_heads\.stages\.(\d)\.0\.0\.1\.", r"roi_head.bbox_head.\1.shared_convs.0.bn."),
    (r"roi_heads\.stages\.(\d)\.0\.2\.", r"roi_head.bbox_head.\1.shared_fcs.0."),
    (r"roi_heads\.stages\.(\d)\.1\.cls_score\.", r"roi_head.bbox_head.\1.fc_cls."),
    (r"roi_heads\.stages\.(\d)\.1\.bbox_pred\.", r"roi_head.bbox_head.\1.fc_reg."),
    (r"roi_heads\.mask_stages\.(\d)\.0\.(\d)\.0\.", r"roi_head.mask_head.\1.convs.\2.conv."),
    (r"roi_heads\.mask_stages\.(\d)\.1\.conv5_mask\.", r"roi_head.mask_head.\1.upsample."),
    (r"roi_heads\.mask_stages\.(\d)\.1\.mask_fcn_logits\.", r"roi_head.mask_head.\1.conv_logits."),
]


def as_mmdet(detector: nn.Module, agnostic: bool = False) -> dict[str, Tensor]:
    """A detector's weights as mmdetection would have them, "nothing" last or left out."""
    found = {}
    for key, tensor in detector.state_dict().items():
        pattern, to = next(pair for pair in _THEIRS if re.match(pair[0], key))
        name = re.sub(pattern, to, key, count=1)
        if ".fc_cls." in name:
            tensor = torch.cat([tensor[1:], tensor[:1]])
        elif ".conv_logits." in name:
            tensor = tensor[1:]
        elif ".fc_reg." in name and not agnostic:
            tensor = tensor[4:]
        found[name] = tensor
    return found


def test_every_weight_finds_its_place() -> None:
    detector = tiny_mask_rcnn()
    found = from_mmdet(as_mmdet(detector), detector)
    detector.load_state_dict(found)
    own = tiny_mask_rcnn().state_dict()
    for key, tensor in own.items():
        if ".downsample." in key or "bbox_pred" in key or "mask_fcn" in key:
            continue
        assert torch.equal(found[key], tensor), key
    assert torch.equal(
        found["roi_heads.box_predictor.bbox_pred.weight"][4:], own["roi_heads.box_predictor.bbox_pred.weight"][4:]
    )
    assert not found["roi_heads.mask_predictor.mask_fcn_logits.weight"][0].any()


def test_merged_patches_are_those_of_unfold() -> None:
    torch.manual_seed(0)
    x, norm, reduction = torch.rand(1, 8, 6, 6), torch.rand(32), torch.rand(16, 32)
    rows = functional.unfold(x, 2, stride=2).transpose(1, 2)
    expected = functional.linear(functional.layer_norm(rows, (32,), norm), reduction)  # as mmdetection does it
    state = as_mmdet(tiny_mask_rcnn()) | {
        "backbone.stages.0.downsample.norm.weight": norm,
        "backbone.stages.0.downsample.reduction.weight": reduction,
    }
    found = from_mmdet(state, tiny_mask_rcnn())
    merging = PatchMerging(8)
    place = "backbone.body.layers_1.downsample."
    merging.load_state_dict({key.removeprefix(place): found[key] for key in found if key.startswith(place)})
    assert torch.allclose(merging(x.permute(0, 2, 3, 1)).flatten(1, 2), expected, atol=1e-5)


def test_cascades_have_their_stages() -> None:
    for options in ({"masks": 1, "convolutions": 1, "agnostic": True}, {"convolutions": 1, "agnostic": False}):
        detector = tiny_cascade(**options)
        detector.load_state_dict(from_mmdet(as_mmdet(detector, bool(options["agnostic"])), detector))


def test_other_checkpoints_are_refused() -> None:
    detector = tiny_mask_rcnn()
    state = as_mmdet(detector)
    with pytest.raises(ModelError, match="no tensor of mmdetection's"):
        from_mmdet(state | {"head.weight": torch.zeros(1)}, detector)
    with pytest.raises(ModelError, match=r"nothing for 'backbone.body.patch_embed.norm.bias' \(1 missing\)"):
        from_mmdet({key: state[key] for key in state if key != "backbone.patch_embed.norm.bias"}, detector)
    with pytest.raises(ModelError, match="has shape"):
        from_mmdet(state | {"rpn_head.rpn_cls.bias": torch.zeros(9)}, detector)
    with pytest.raises(ModelError, match="does not have"):
        from_mmdet(state | {"backbone.stages.3.blocks.0.norm1.weight": torch.zeros(8)}, detector)
