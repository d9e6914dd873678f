"""timm beyond the classifiers of tests/conformance: features, tokens, maps, other sizes, and further families."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
from torch import nn

from benchmarks.conformance_models.case import Calling, Case

_VIT: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
_VIT14: dict[str, Any] = {**_VIT, "img_size": 28}
_SWIN: dict[str, Any] = {
    "img_size": 64, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 10,
}  # fmt: skip
_ONE_EACH: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_classes": 10}
_FEATURES: dict[str, Any] = {"num_classes": 0}
_TOKENS: dict[str, Any] = {"num_classes": 0, "global_pool": ""}
_MAPS: dict[str, Any] = {"features_only": True}

_MODELS: list[tuple[str, str, int | tuple[int, int], dict[str, Any]]] = [
    ("vit_tiny_patch16_224", "features", 32, {**_VIT, **_FEATURES}),
    ("vit_tiny_patch16_224", "tokens", 32, {**_VIT, **_TOKENS}),
    ("vit_tiny_patch16_224", "features_only", 32, {**_VIT, **_MAPS, "out_indices": (0, 1)}),
    ("vit_tiny_patch16_224", "48 x 32 pixels", (48, 32), {**_VIT, "img_size": (48, 32)}),
    ("vit_tiny_patch16_224", "dynamic_img_size, 48 pixels", 48, {**_VIT, "dynamic_img_size": True}),
    ("vit_tiny_patch16_224", "qk_norm", 32, {**_VIT, "qk_norm": True}),
    ("deit3_small_patch16_224", "features", 32, {**_VIT, **_FEATURES}),
    ("deit_tiny_distilled_patch16_224", "features", 32, {**_VIT, **_FEATURES}),
    ("beitv2_base_patch16_224", "features_only", 32, {**_VIT, **_MAPS, "out_indices": (0, 1)}),
    ("beit3_base_patch16_224", "classes", 32, _VIT),
    ("eva02_tiny_patch14_224", "tokens", 28, {**_VIT14, **_TOKENS}),
    ("vit_small_patch14_dinov2", "tokens, 28 x 42 pixels", (28, 42), {**_VIT14, **_TOKENS, "img_size": (28, 42)}),
    ("vit_small_patch14_reg4_dinov2", "features_only", 28, {**_VIT14, **_MAPS, "out_indices": (0, 1)}),
    ("vit_small_plus_patch16_dinov3", "features", 32, {**_VIT, **_FEATURES}),
    ("vit_small_patch16_dinov3", "tokens", 32, {**_VIT, **_TOKENS}),
    ("vit_base_patch16_siglip_224", "pooled features", 32, {**_VIT, **_FEATURES}),
    ("vit_medium_patch16_gap_256", "classes", 32, _VIT),
    ("vit_betwixt_patch16_reg4_gap_256", "classes", 32, _VIT),
    ("vit_base_patch16_rope_reg1_gap_256", "classes", 32, _VIT),
    ("vit_base_patch16_rope_mixed_ape_224", "classes", 32, _VIT),
    ("vit_pe_core_tiny_patch16_384", "pooled features", 32, _VIT | {"num_classes": 0}),
    ("vit_pe_spatial_tiny_patch16_512", "tokens", 32, _VIT | {"num_classes": 0}),
    ("vit_dlittle_patch16_reg1_gap_256", "classes", 32, _VIT),
    ("vit_so150m_patch16_reg4_map_256", "classes", 32, _VIT),
    ("vit_srelpos_small_patch16_224", "classes", 32, _VIT),
    ("vit_relpos_base_patch16_clsgap_224", "classes", 32, _VIT),
    ("vit_intern300m_patch14_448", "classes", 28, _VIT14),
    ("naflexvit_base_patch16_siglip", "pooled features", 32, {**_VIT, "img_size": None, "num_classes": 0}),
    ("test_vit3", "classes", 160, {"num_classes": 10}),
    ("samvit_base_patch16_224", "feature map", 64, {**_VIT, **_TOKENS, "img_size": 64, "window_size": 3}),
    ("swin_tiny_patch4_window7_224", "features_only", 64, {**_SWIN, **_MAPS, "out_indices": (0, 1)}),
    ("swin_s3_tiny_224", "classes", 64, {**_SWIN, "window_size": (4, 4)}),
    ("swinv2_tiny_window8_256", "feature map", 64, {**_SWIN, **_TOKENS}),
    ("hieradet_small", "classes", 64, {"stages": (1, 1, 2, 1), "global_att_blocks": (3,), "num_classes": 10}),
    ("hiera_tiny_224", "features_only", 224, {"stages": (1, 1, 1, 1), "embed_dim": 24, **_MAPS}),
    ("mvitv2_tiny", "features", 64, {"img_size": 64, "num_classes": 0}),
    ("pvt_v2_b2_li", "classes", 64, {**_ONE_EACH, "embed_dims": (16, 32, 40, 64)}),
    ("pvt_v2_b0", "features_only", 64, {"depths": (1, 1, 1, 1), **_MAPS}),
    ("efficientvit_b0", "classes", 64, {"num_classes": 10}),
    ("efficientvit_m0", "classes", 224, {"num_classes": 10}),
    ("fastvit_sa12", "classes", 64, {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_classes": 10}),
    ("swiftformer_xs", "classes", 64, {"num_classes": 10}),
    ("shvit_s1", "classes", 128, {"depth": (1, 1, 1), "num_classes": 10}),
    ("mobilenetv4_hybrid_medium", "classes", 64, {"num_classes": 10}),
    ("maxvit_tiny_tf_224", "classes", 224, {**_ONE_EACH, "embed_dim": (32, 32, 64, 64)}),
    ("maxxvit_rmlp_nano_rw_256", "classes", 256, _ONE_EACH),
    ("convformer_s18", "classes", 64, {"num_classes": 10}),
    ("coat_tiny", "classes", 64, {"img_size": 64, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1,
     "num_classes": 10}),
    ("crossvit_9_240", "classes", 240, {"depth": ((1, 1, 0),), "embed_dim": (32, 64), "num_heads": (2, 2),
     "mlp_ratio": (2, 2, 1), "num_classes": 10}),
    ("levit_conv_128s", "classes", 224, {"depth": (1, 1, 1), "num_classes": 10}),
    ("davit_tiny", "features_only", 64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64),
     "num_heads": (1, 2, 2, 4), **_MAPS}),
    ("xcit_nano_12_p16_224", "tokens", 64, {"img_size": 64, "depth": 1, **_TOKENS}),
    ("tiny_vit_5m_224", "features_only", 224, {"depths": (1, 1, 1, 1), **_MAPS}),
    ("efficientformerv2_s0", "features_only", 224, {"depths": (1, 1, 1, 1), **_MAPS}),
    ("mobilevit_xxs", "features_only", 64, _MAPS),
    ("nest_tiny_jx", "feature map", 224, _TOKENS),
]  # fmt: skip


def _model(name: str, options: dict[str, Any]) -> nn.Module:
    given = {key: value for key, value in options.items() if value is not None}
    if given.get("features_only"):
        given.pop("num_classes", None)
    model: nn.Module = timm.create_model(name, **given)
    return model


def _calling(method: str, **options: Any) -> nn.Module:
    return Calling(_model("vit_tiny_patch16_224", _VIT), method, **options)


def cases() -> Iterator[Case]:
    """All of them."""
    for name, use, size, options in _MODELS:
        sides = size if isinstance(size, tuple) else (size, size)
        yield Case(f"timm: {name}, {use}", lambda name=name, options=options: _model(name, options), sides)
    yield Case("timm: vit_tiny_patch16_224, forward_features", lambda: _calling("forward_features"), (32, 32))
    yield Case(
        "timm: vit_tiny_patch16_224, get_intermediate_layers",
        lambda: _calling("get_intermediate_layers", n=2, return_prefix_tokens=True, norm=True),
        (32, 32),
    )
    yield Case("timm: vit_tiny_patch16_224, forward_intermediates", lambda: _calling("forward_intermediates"), (32, 32))
