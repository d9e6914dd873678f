"""Models of transformers as they are, made from small configurations; with fused and with written-out attention."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.conformance_models.case import Case

_VIT: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_WINDOWS: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
_STAGES: dict[str, Any] = {
    "hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4],
    "mlp_ratios": [2, 2, 2, 2],
}  # fmt: skip
_SAM: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_dim": 96, "image_size": 64,
    "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "output_channels": 24,
}  # fmt: skip
_DPT: dict[str, Any] = {
    **_VIT, "num_hidden_layers": 4, "image_size": 64, "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [16, 16, 24, 24], "fusion_hidden_size": 16,
}  # fmt: skip
_CVT: dict[str, Any] = {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}
_LEVIT: dict[str, Any] = {
    "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
    "down_ops": [["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]],
}  # fmt: skip
_HIERA: dict[str, Any] = {
    "embed_dim": 24, "image_size": [64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4],
    "masked_unit_size": [8, 8], "num_query_pool": 3,
}  # fmt: skip
_MOBILE: dict[str, Any] = {
    "image_size": 64, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 40],
}  # fmt: skip
_LABELS: dict[str, Any] = {"num_labels": 10}
_BACKBONE: dict[str, Any] = {**_VIT, "out_features": ["stage1", "stage2"]}

# Model, configuration, its values, (height, width).
_MODELS: list[tuple[str, str, dict[str, Any], tuple[int, int]]] = [
    ("ViTForImageClassification", "ViTConfig", {**_VIT, **_LABELS}, (32, 32)),
    ("ViTModel", "ViTConfig", _VIT, (32, 32)),
    ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**_VIT, **_LABELS}, (32, 32)),
    ("DeiTModel", "DeiTConfig", _VIT, (32, 32)),
    ("Dinov2Model", "Dinov2Config", _VIT, (32, 32)),
    ("Dinov2ForImageClassification", "Dinov2Config", {**_VIT, **_LABELS, "use_swiglu_ffn": True}, (32, 32)),
    ("Dinov2Backbone", "Dinov2Config", _BACKBONE, (32, 32)),
    ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _VIT, (32, 32)),
    ("DINOv3ViTModel", "DINOv3ViTConfig", {**_VIT, "num_register_tokens": 4}, (32, 32)),
    ("CLIPVisionModel", "CLIPVisionConfig", _VIT, (32, 32)),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**_VIT, "projection_dim": 24}, (32, 32)),
    ("SiglipVisionModel", "SiglipVisionConfig", _VIT, (32, 32)),
    ("BeitForImageClassification", "BeitConfig", {**_VIT, **_LABELS, "use_relative_position_bias": True}, (32, 32)),
    ("Data2VecVisionModel", "Data2VecVisionConfig", {**_VIT, "use_shared_relative_position_bias": True}, (32, 32)),
    ("SwinModel", "SwinConfig", _WINDOWS, (32, 32)),
    ("SwinForImageClassification", "SwinConfig", {**_WINDOWS, **_LABELS}, (32, 32)),
    ("Swinv2ForImageClassification", "Swinv2Config", {**_WINDOWS, **_LABELS}, (32, 32)),
    ("SwinBackbone", "SwinConfig", {**_WINDOWS, "out_features": ["stage1", "stage2"]}, (32, 32)),
    ("SegformerForImageClassification", "SegformerConfig", {**_STAGES, **_LABELS}, (64, 64)),
    ("SegformerForSemanticSegmentation", "SegformerConfig", {**_STAGES, **_LABELS,
     "decoder_hidden_size": 32}, (64, 64)),
    ("YolosForObjectDetection", "YolosConfig", {**_VIT, "image_size": [32, 48], "num_detection_tokens": 5}, (32, 48)),
    ("ViTMAEModel", "ViTMAEConfig", {**_VIT, "mask_ratio": 0.0}, (32, 32)),
    ("ViTMSNModel", "ViTMSNConfig", _VIT, (32, 32)),
    ("IJepaModel", "IJepaConfig", _VIT, (32, 32)),
    ("DPTForDepthEstimation", "DPTConfig", _DPT, (64, 64)),
    ("DPTForSemanticSegmentation", "DPTConfig", {**_DPT, **_LABELS}, (64, 64)),
    ("GLPNForDepthEstimation", "GLPNConfig", {**_STAGES, "decoder_hidden_size": 16}, (64, 64)),
    ("PvtForImageClassification", "PvtConfig", {**_STAGES, **_LABELS, "image_size": 64}, (64, 64)),
    ("PvtV2ForImageClassification", "PvtV2Config", {**_STAGES, **_LABELS, "image_size": 64}, (64, 64)),
    ("LevitForImageClassification", "LevitConfig", {**_LEVIT, **_LABELS}, (64, 64)),
    ("CvtForImageClassification", "CvtConfig", {**_CVT, **_LABELS}, (64, 64)),
    ("MobileViTForImageClassification", "MobileViTConfig", {**_MOBILE, **_LABELS}, (64, 64)),
    ("MobileViTV2ForImageClassification", "MobileViTV2Config", {**_LABELS, "image_size": 64,
     "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]}, (64, 64)),
    ("PoolFormerForImageClassification", "PoolFormerConfig", {**_LABELS, "hidden_sizes": [16, 16, 32, 32],
     "depths": [1, 1, 1, 1]}, (64, 64)),
    ("FocalNetForImageClassification", "FocalNetConfig", {**_LABELS, "image_size": 32, "patch_size": 2,
     "embed_dim": 24, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3],
     "hidden_sizes": [24, 48]}, (32, 32)),
    ("BlipVisionModel", "BlipVisionConfig", _VIT, (32, 32)),
    ("Blip2VisionModel", "Blip2VisionConfig", _VIT, (32, 32)),
    ("SamVisionModel", "SamVisionConfig", _SAM, (64, 64)),
    ("HieraModel", "HieraConfig", _HIERA, (64, 64)),
    ("VitDetModel", "VitDetConfig", {**_VIT, "intermediate_size": None, "pretrain_image_size": 32,
     "window_block_indices": [0], "window_size": 2, "use_relative_position_embeddings": True}, (32, 32)),
    ("VitPoseBackbone", "VitPoseBackboneConfig", {**_VIT, "image_size": [32, 24], "patch_size": [8, 8]}, (32, 24)),
    ("DonutSwinModel", "DonutSwinConfig", _WINDOWS, (32, 32)),
    ("Swin2SRForImageSuperResolution", "Swin2SRConfig", {"image_size": 16, "embed_dim": 24, "depths": [2],
     "num_heads": [2], "window_size": 4}, (16, 16)),
    ("CLIPSegVisionModel", "CLIPSegVisionConfig", _VIT, (32, 32)),
    ("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", _VIT, (32, 32)),
    ("MetaClip2VisionModel", "MetaClip2VisionConfig", _VIT, (32, 32)),
    ("Owlv2VisionModel", "Owlv2VisionConfig", _VIT, (32, 32)),
    ("Aimv2VisionModel", "Aimv2VisionConfig", _VIT, (32, 32)),
    ("InternVLVisionModel", "InternVLVisionConfig", {**_VIT, "image_size": [32, 32], "patch_size": [8, 8]}, (32, 32)),
    ("JanusVisionModel", "JanusVisionConfig", _VIT, (32, 32)),
    ("Idefics3VisionTransformer", "Idefics3VisionConfig", _VIT, (32, 32)),
    ("FlavaImageModel", "FlavaImageConfig", _VIT, (32, 32)),
    ("PixtralVisionModel", "PixtralVisionConfig", {**_VIT, "head_dim": 16}, (32, 32)),
    ("GroupViTVisionModel", "GroupViTVisionConfig", {**_VIT, "depths": [1, 1], "num_group_tokens": [4, 0],
     "num_output_groups": [4, 4], "num_hidden_layers": 2}, (32, 32)),
]  # fmt: skip
_EAGER = {
    "ViTModel", "DeiTModel", "Dinov2Model", "DINOv3ViTModel", "CLIPVisionModel", "SiglipVisionModel", "SamVisionModel",
    "BeitForImageClassification", "DPTForDepthEstimation",
}  # fmt: skip


def _model(name: str, configuration: str, values: dict[str, Any], attention: str | None) -> nn.Module:
    import transformers

    found = getattr(transformers, configuration)(**{key: value for key, value in values.items() if value is not None})
    if attention is not None:
        found._attn_implementation = attention
    model: nn.Module = getattr(transformers, name)(found)
    return model


class InOrder(nn.Module):
    """A ViTMAE that draws no order of patches: the noise that it sorts them by is given, and has them in theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _model("ViTMAEModel", "ViTMAEConfig", {**_VIT, "mask_ratio": 0.0}, None)

    def forward(self, images_bchw: Tensor) -> Any:
        """The model's output for images (B, 3, 32, 32), of which it makes 16 patches."""
        noise = torch.linspace(0, 1, 16, device=images_bchw.device)
        return self.model(images_bchw, noise=noise.expand(images_bchw.shape[0], -1))


def _llava_tower() -> nn.Module:
    """The vision tower of LLaVA as `get_vision_tower` hands it out, whose last but one layer is read."""
    import transformers

    vision = transformers.CLIPVisionConfig(**_VIT)
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model: Any = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text)
    )
    tower: nn.Module = model.model.vision_tower
    return tower


def cases() -> Iterator[Case]:
    """All of them."""
    for name, configuration, values, size in _MODELS:
        for attention in (None, "eager") if name in _EAGER else (None,):
            spelling = "" if attention is None else f", {attention} attention"
            build = functools.partial(_model, name, configuration, values, attention)
            yield Case(f"transformers: {name}{spelling}", build, size)
    yield Case("transformers: ViTMAEModel, noise given", InOrder, (32, 32))
    yield Case("transformers: LLaVA's tower, hidden states", _llava_tower, (32, 32), {"output_hidden_states": True})
    yield Case(
        "transformers: ViTModel, attentions",
        functools.partial(_model, "ViTModel", "ViTConfig", _VIT, "eager"),
        (32, 32),
        {"output_attentions": True},
    )
    yield Case(
        "transformers: Dinov2Model, 48 x 64 pixels",
        functools.partial(_model, "Dinov2Model", "Dinov2Config", _VIT, None),
        (48, 64),
    )
