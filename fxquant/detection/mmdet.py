"""Weights of mmdetection's Swin detectors by the names that the detectors here have.

    detector.load_state_dict(from_mmdet(torch.load("mask_rcnn_swin-t.pth", weights_only=True)["state_dict"], detector))

Besides names, three things differ. mmdetection merges patches by `nn.Unfold`, which gives the four neighbours of each
channel in a row, where Swin and timm give all channels of one neighbour after the other. It counts "nothing" as the
last class, torchvision as the first. And it has neither deltas nor masks of "nothing", for which zeros stand here.

No checkpoint was at hand: what is tested are names, shapes and orders. One difference stays: mmdetection's RoIAlign
(aligned=True) cuts regions half a pixel of the map further up and left than torchvision's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxquant.errors import ModelError

_BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)\."
_NAMES = [
    (r"backbone\.patch_embed\.projection\.", r"backbone.body.patch_embed.proj."),
    (r"backbone\.patch_embed\.norm\.", r"backbone.body.patch_embed.norm."),
    (_BLOCK + r"attn\.w_msa\.", r"backbone.body.layers_\1.blocks.\2.attn."),
    (_BLOCK + r"norm(\d)\.", r"backbone.body.layers_\1.blocks.\2.norm\3."),
    (_BLOCK + r"ffn\.layers\.0\.0\.", r"backbone.body.layers_\1.blocks.\2.mlp.fc1."),
    (_BLOCK + r"ffn\.layers\.1\.", r"backbone.body.layers_\1.blocks.\2.mlp.fc2."),
    (r"backbone\.norm(\d)\.", r"backbone.norms.\1."),
    (r"neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d+)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"rpn_head\.rpn_conv\.", r"rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", r"rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", r"rpn.head.bbox_pred."),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", r"roi_heads.box_head.fc6."),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.", r"roi_heads.box_head.fc7."),
    (r"roi_head\.bbox_head\.fc_cls\.", r"roi_heads.box_predictor.cls_score."),
    (r"roi_head\.bbox_head\.fc_reg\.", r"roi_heads.box_predictor.bbox_pred."),
    (r"roi_head\.mask_head\.convs\.(\d+)\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"roi_head\.mask_head\.upsample\.", r"roi_heads.mask_predictor.conv5_mask."),
    (r"roi_head\.mask_head\.conv_logits\.", r"roi_heads.mask_predictor.mask_fcn_logits."),
    (r"roi_head\.bbox_head\.(\d)\.shared_convs\.(\d+)\.conv\.", r"roi_heads.stages.\1.0.\2.0."),
    (r"roi_head\.bbox_head\.(\d)\.shared_convs\.(\d+)\.bn\.", r"roi_heads.stages.\1.0.\2.1."),
    (r"roi_head\.bbox_head\.(\d)\.fc_cls\.", r"roi_heads.stages.\1.1.cls_score."),
    (r"roi_head\.bbox_head\.(\d)\.fc_reg\.", r"roi_heads.stages.\1.1.bbox_pred."),
    (r"roi_head\.mask_head\.(\d)\.convs\.(\d+)\.conv\.", r"roi_heads.mask_stages.\1.0.\2.0."),
    (r"roi_head\.mask_head\.(\d)\.upsample\.", r"roi_heads.mask_stages.\1.1.conv5_mask."),
    (r"roi_head\.mask_head\.(\d)\.conv_logits\.", r"roi_heads.mask_stages.\1.1.mask_fcn_logits."),
]
_MERGING = re.compile(r"backbone\.stages\.(\d+)\.downsample\.")
_STAGE_LINEAR = re.compile(r"roi_head\.bbox_head\.(\d)\.shared_fcs\.(\d)\.")
_DROPPED = ("relative_position_index", "num_batches_tracked")


def from_mmdet(state: Mapping[str, Tensor], detector: nn.Module) -> dict[str, Tensor]:
    """The state of a detector of `fxquant.detection`, for `load_state_dict`.

    Args:
        state: of mmdetection's Mask R-CNN or Cascade Mask R-CNN with a Swin backbone.
        detector: a detector of the same architecture.

    Raises ModelError for names that are not known, and for tensors that are missing, too many or of other shapes.
    """
    wanted = detector.state_dict()
    found = {key: tensor for key, tensor in wanted.items() if key.endswith(_DROPPED)}
    for name, tensor in state.items():
        if not name.endswith(_DROPPED):
            key = _key(name, wanted)
            found[key] = _tensor(name, key, tensor, wanted)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ModelError(
            f"the checkpoint has nothing for '{missing[0]}' ({len(missing)} missing): build the same detector"
        )
    return found


def _key(name: str, wanted: Mapping[str, Tensor]) -> str:
    merging, linear = _MERGING.match(name), _STAGE_LINEAR.match(name)
    if merging:
        key = f"backbone.body.layers_{int(merging[1]) + 1}.downsample.{name[merging.end() :]}"
    elif linear:
        key = _linear(int(linear[1]), int(linear[2]), wanted) + name[linear.end() :]
    else:
        pair = next(((p, to) for p, to in _NAMES if re.match(p, name)), None)
        if pair is None:
            raise ModelError(
                f"'{name}' is no tensor of mmdetection's Swin detectors: give the state_dict of a checkpoint"
            )
        key = re.sub(*pair, name, count=1)
    if key not in wanted:
        raise ModelError(f"'{name}' belongs at '{key}', which the detector does not have: build the same architecture")
    return key


def _linear(stage: int, index: int, wanted: Mapping[str, Tensor]) -> str:
    """Where a linear layer of a cascade's stage stands: behind convolutions and a flattening, or alone."""
    prefix = f"roi_heads.stages.{stage}.0."
    convolutions = sum(bool(re.fullmatch(re.escape(prefix) + r"\d+\.0\.weight", key)) for key in wanted)
    return f"{prefix}{convolutions + 1 + 2 * index}." if convolutions else f"{prefix}fc{6 + index}."


def _tensor(name: str, key: str, tensor: Tensor, wanted: Mapping[str, Tensor]) -> Tensor:
    expected = wanted[key].shape
    if ".downsample." in name:
        tensor = _by_neighbour(tensor)
    elif ".fc_cls." in name:
        tensor = tensor.roll(1, 0)
    elif (".fc_reg." in name and len(expected) and len(tensor) != expected[0]) or ".conv_logits." in name:
        nothing = expected[0] - len(tensor)
        tensor = torch.cat([tensor.new_zeros(max(nothing, 0), *tensor.shape[1:]), tensor])
    if tensor.shape != expected:
        raise ModelError(f"'{name}' has shape {tuple(tensor.shape)}, and '{key}' of the detector {tuple(expected)}")
    return tensor


def _by_neighbour(tensor: Tensor) -> Tensor:
    """The last dimension from (channel, row, column) to (column, row, channel) of the four neighbours."""
    channels = tensor.shape[-1] // 4
    return tensor.reshape(*tensor.shape[:-1], channels, 2, 2).movedim(-3, -1).transpose(-3, -2).flatten(-3)
