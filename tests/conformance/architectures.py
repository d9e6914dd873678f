"""Architectures that must trace, and what must be found in them.

Each row: timm name, image size, overrides that keep it small, blocks, and roles beyond one of each per block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

STACKED = ("Block", "TransformerLayer", "Transformer", "Outlooker")
BLOCK_ROLES = ("qkv", "qk", "softmax", "av", "proj", "fc1", "gelu", "fc2")


@dataclass(frozen=True)
class Architecture:
    """One row.

    Args:
        name: what timm calls it.
        size: of its images.
        options: for timm.
        blocks: transformer blocks, None where roles are not asserted.
        counts: roles that are not one per block.
        is_cut: of every stack of blocks the first two are kept, where timm has no option for the depth.
    """

    name: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)
    blocks: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    is_cut: bool = False

    def built(self) -> nn.Module:
        """The model, with random weights."""
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(self.name, **self.options)
        for stack in list(model.modules()) if self.is_cut else []:
            kinds = {type(block).__name__ for block in stack.children()}
            if isinstance(stack, nn.Sequential | nn.ModuleList) and len(kinds) == 1 and kinds.pop().endswith(STACKED):
                del stack[2:]
        return model


VIT = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
VIT14 = {**VIT, "img_size": 28}
SWIN = {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
STAGES = {"depths": (1, 1, 1, 1)}

# Every block's roles are asserted here.
TRANSFORMERS = [
    Architecture("vit_tiny_patch16_224", 32, VIT, 2),
    Architecture("vit_small_patch16_224", 32, VIT, 2),
    Architecture("vit_base_patch16_224", 32, {**VIT, "num_heads": 4}, 2),
    Architecture("deit_tiny_patch16_224", 32, VIT, 2),
    Architecture("deit_tiny_distilled_patch16_224", 32, VIT, 2, {"head": 2}),
    Architecture("deit3_small_patch16_224", 32, VIT, 2),
    Architecture("beit_base_patch16_224", 32, VIT, 2),
    Architecture("beitv2_base_patch16_224", 32, VIT, 2),
    Architecture("eva02_tiny_patch14_224", 28, {**VIT14, "num_classes": 10}, 2, {"gelu": 0}),
    Architecture("eva02_base_patch14_224", 28, {**VIT14, "num_classes": 10}, 2, {"gelu": 0, "qkv": 6, "fc1": 4}),
    Architecture("eva_giant_patch14_224", 28, VIT14, 2),
    Architecture("vit_small_patch14_dinov2", 28, {**VIT14, "num_classes": 10}, 2),
    Architecture("vit_small_patch14_reg4_dinov2", 28, {**VIT14, "num_classes": 10}, 2),
    Architecture("vit_giant_patch14_dinov2", 28, {**VIT14, "num_classes": 10}, 2, {"gelu": 0}),
    Architecture("vit_small_patch16_dinov3", 32, {**VIT, "num_classes": 10}, 2),
    # The attention pool is a third block; its query is a constant.
    Architecture("vit_base_patch16_siglip_224", 32, VIT, 3, {"head": 0, "qkv": 4}),
    Architecture("vit_base_patch16_siglip_gap_224", 32, {**VIT, "num_classes": 10}, 2),
    Architecture("vit_base_patch16_clip_224", 32, VIT, 2),
    Architecture("vit_base_patch16_clip_quickgelu_224", 32, VIT, 2),
    Architecture("swin_tiny_patch4_window7_224", 64, {**SWIN, "window_size": 4}, 4, {"reduction": 1}),
    Architecture("swinv2_tiny_window8_256", 64, {**SWIN, "window_size": 4}, 4, {"reduction": 1}),
    Architecture("vit_relpos_small_patch16_224", 32, VIT, 2),
    Architecture("vit_srelpos_small_patch16_224", 32, VIT, 2),
    Architecture("vit_intern300m_patch14_448", 28, VIT14, 2),
    Architecture("beit3_base_patch16_224", 32, VIT, 2),
    Architecture("vit_small_patch16_rope_224", 32, VIT, 2),
    Architecture("flexivit_small", 32, VIT, 2),
    Architecture("mixer_s32_224", 64, {"img_size": 64}, 4, dict.fromkeys(BLOCK_ROLES[:5], 0), is_cut=True),
    Architecture("hiera_tiny_224", 224, {"stages": (1, 1, 1, 1)}, 4),
    Architecture("visformer_tiny", 224, {"depth": (0, 1, 1), "embed_dim": 48}, 2),
]

# These must trace and compute the same; every layer must have some role.
OTHERS = [
    Architecture("swinv2_cr_tiny_ns_224", 224, {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4)}),
    Architecture("cait_xxs24_224", 32, {"img_size": 32, "depth": 1}),
    Architecture("levit_128s", 224, is_cut=True),
    Architecture("pvt_v2_b0", 64, STAGES),
    Architecture("twins_pcpvt_small", 64, {**STAGES, "img_size": 64}),
    Architecture("twins_svt_small", 64, {**STAGES, "img_size": 64}),
    Architecture("xcit_nano_12_p16_224", 64, {"img_size": 64, "depth": 1}),
    Architecture("tnt_s_patch16_224", 32, {"img_size": 32, "depth": 1}),
    Architecture("volo_d1_224", 64, {"img_size": 64}, is_cut=True),
    Architecture("pit_ti_224", 224, {"depth": (1, 1, 1)}),
    Architecture("davit_tiny", 64, STAGES),
    Architecture("gcvit_xxtiny", 224, is_cut=True),
    Architecture("mvitv2_tiny", 64, {"img_size": 64}, is_cut=True),
    Architecture("nest_tiny_jx", 224, is_cut=True),
    Architecture("poolformer_s12", 64, is_cut=True),
    Architecture("convit_tiny", 32, {"img_size": 32, "depth": 1}),
    Architecture("crossvit_tiny_240", 240, is_cut=True),
    Architecture("coat_lite_tiny", 64, {"img_size": 64, "serial_depths": (1, 1, 1, 1)}),
    Architecture("maxvit_rmlp_pico_rw_256", 256, STAGES),
    Architecture("coatnet_nano_rw_224", 224, STAGES),
    Architecture("efficientformer_l1", 224, STAGES),
    Architecture("efficientformerv2_s0", 224, STAGES),
    Architecture("mobilevit_xxs", 64, is_cut=True),
    Architecture("mobilevitv2_050", 64),
    Architecture("tiny_vit_5m_224", 224, STAGES),
    Architecture("edgenext_xx_small", 64, STAGES),
    Architecture("focalnet_tiny_srf", 64, is_cut=True),
    Architecture("nextvit_small", 64, {"depths": (1, 2, 5, 2)}),
    Architecture("resmlp_12_224", 32, {"img_size": 32}, is_cut=True),
    Architecture("gmlp_s16_224", 32, {"img_size": 32}, is_cut=True),
    Architecture("caformer_s18", 64, is_cut=True),
    Architecture("vit_tiny_r_s16_p8_224", 64, {"img_size": 64, "depth": 1}),
    Architecture("samvit_base_patch16_224", 224, {"depth": 1, "embed_dim": 48, "num_heads": 3}),
    Architecture("vitamin_small_224", 64, {"img_size": 64, "depth": 1}),
    Architecture("convnext_atto", 64, STAGES),
    Architecture("vit_base_patch16_xp_224", 32, VIT),
    Architecture("aimv2_large_patch14_224", 28, VIT14),
    Architecture("resnet18", 64, {"layers": (1, 1, 1, 1)}),
    Architecture("vit_pe_core_tiny_patch16_384", 32, VIT),
    Architecture("hieradet_small", 64, {"stages": (1, 1, 2, 1), "global_att_blocks": (3,)}),
    # Adds its position embedding in place.
    Architecture("naflexvit_base_patch16_gap", 32, {"depth": 1, "embed_dim": 48, "num_heads": 3}),
]

# What stands in the way, and a small instance of it: (image size, overrides, reason).
KNOWN_UNTRACEABLE: dict[str, tuple[int, dict[str, Any], str]] = {
    "sequencer2d_s": (32, {"img_size": 32, "layers": (1, 1, 1, 1)}, "its weights are inside LSTM modules"),
}
