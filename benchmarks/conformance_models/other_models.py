"""torchvision, open_clip, vit-pytorch, segment-anything and modules that are written by hand."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.conformance_models.case import Case


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    return getattr(models, name)(weights=None, **options)


def _swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    options: dict[str, Any] = {} if version == 1 else {
        "block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2,
    }  # fmt: skip
    return swin.SwinTransformer([4, 4], 24, [2, 1], [2, 4], [4, 4], num_classes=10, **options)


def _vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=10)


def _maxvit() -> nn.Module:
    from torchvision.models.maxvit import MaxVit

    return MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10)


def _open_clip(name: str, vision: dict[str, Any]) -> nn.Module:
    """The image tower of a model whose configuration is cut to two layers."""
    import open_clip

    configuration = open_clip.get_model_config(name)
    configuration["vision_cfg"] |= vision
    from open_clip.model import _build_vision_tower

    tower: nn.Module = _build_vision_tower(
        configuration["embed_dim"], configuration["vision_cfg"], quick_gelu=configuration.get("quick_gelu", False)
    )
    return tower


def _mobile_clip() -> nn.Module:
    """MobileCLIP-S1's image tower with the first block of every stage, since its configuration tells no depths."""
    tower: Any = _open_clip("MobileCLIP-S1", {})
    for stage in tower.trunk.stages:
        stage.blocks = stage.blocks[:1]
    model: nn.Module = tower
    return model


def _vit_pytorch(module: str, name: str, **options: Any) -> nn.Module:
    model: nn.Module = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**options)
    return model


def _segment_anything() -> nn.Module:
    from segment_anything.modeling.image_encoder import ImageEncoderViT

    return ImageEncoderViT(
        img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=3, out_chans=24, use_rel_pos=True,
        rel_pos_zero_init=False, window_size=3, global_attn_indexes=(1,),
    )  # fmt: skip


class Patches(nn.Module):
    """A patch embedding and a class token before whatever takes tokens (B, T, C), and a head behind it."""

    def __init__(self, body: nn.Module, channels: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, channels))
        self.positions = nn.Parameter(torch.zeros(1, 17, channels))
        self.body, self.norm, self.head = body, nn.LayerNorm(channels), nn.Linear(channels, 10)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Class scores (B, 10) of images (B, 3, 32, 32)."""
        tokens = self.patches(images_bchw).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.positions
        scores: Tensor = self.head(self.norm(self.body(tokens))[:, 0])
        return scores


class OneTensorAttention(nn.Module):
    """Self-attention by nn.MultiheadAttention, with a residual."""

    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(channels), nn.MultiheadAttention(channels, 3, batch_first=True)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 96), nn.GELU(), nn.Linear(96, channels))

    def forward(self, tokens_btc: Tensor) -> Tensor:
        """Tokens (B, T, C) to the same."""
        normed = self.norm(tokens_btc)
        tokens_btc = tokens_btc + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens_btc + self.mlp(self.norm2(tokens_btc))


class EinsumAttention(nn.Module):
    """Attention by einops and einsum, with heads in a weight of three axes, which torch.einsum multiplies."""

    def __init__(self, channels: int = 48, heads: int = 3) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(channels), heads
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, tokens_btc: Tensor) -> Tensor:
        """Tokens (B, T, C) to the same."""
        from einops import rearrange

        q, k, v = rearrange(self.qkv(self.norm(tokens_btc)), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        scores = torch.einsum("b h q d, b h k d -> b h q k", q, k) * q.shape[-1] ** -0.5
        found = torch.einsum("b h q k, b h k d -> b h q d", scores.softmax(-1), v)
        return tokens_btc + self.out(rearrange(found, "b h t d -> b t (h d)"))


class InLists(nn.Module):
    """Layers in a list of lists, called by number; scores are scaled after the product, and attention is fused."""

    def __init__(self, channels: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [nn.LayerNorm(channels), *(nn.Linear(channels, channels) for _ in range(4)), nn.LayerNorm(channels),
                 nn.Linear(channels, 96), nn.Linear(96, channels)]
            )
            for _ in range(depth)
        )  # fmt: skip

    def forward(self, tokens_btc: Tensor) -> Tensor:
        """Tokens (B, T, C) to the same."""
        for norm, query, key, value, out, second, fc1, fc2 in self.layers:
            normed = norm(tokens_btc)
            q, k, v = (layer(normed).unflatten(-1, (3, 16)).transpose(1, 2) for layer in (query, key, value))
            found = functional.scaled_dot_product_attention(q, k, v)
            tokens_btc = tokens_btc + out(found.transpose(1, 2).flatten(2))
            tokens_btc = tokens_btc + fc2(functional.gelu(fc1(second(tokens_btc))))
        return tokens_btc


def _encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 3, 96, batch_first=True, **options)
    return Patches(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


_VIT: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 48, "depth": 2, "heads": 3, "mlp_dim": 96,
}  # fmt: skip
_CLIP: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}

_OTHERS: list[tuple[str, Callable[[], nn.Module], tuple[int, int]]] = [
    ("torchvision: vit_b_16's VisionTransformer", _vit, (32, 32)),
    ("torchvision: swin_t's SwinTransformer", functools.partial(_swin, 1), (64, 64)),
    ("torchvision: swin_v2_t's SwinTransformer", functools.partial(_swin, 2), (64, 64)),
    ("torchvision: maxvit_t's MaxVit", _maxvit, (64, 64)),
    ("open_clip: ViT-B-32", functools.partial(_open_clip, "ViT-B-32", _CLIP), (32, 32)),
    ("open_clip: ViT-B-32-quickgelu", functools.partial(_open_clip, "ViT-B-32-quickgelu", _CLIP), (32, 32)),
    ("open_clip: coca_ViT-B-32", functools.partial(_open_clip, "coca_ViT-B-32", _CLIP), (32, 32)),
    ("open_clip: ViT-H-14-CLIPA", functools.partial(_open_clip, "ViT-H-14-CLIPA", {**_CLIP,
     "mlp_ratio": 2.0}), (32, 32)),
    ("open_clip: MobileCLIP-S1", _mobile_clip, (64, 64)),
    ("vit-pytorch: vit", functools.partial(_vit_pytorch, "vit", "ViT", **_VIT), (32, 32)),
    ("vit-pytorch: simple_vit", functools.partial(_vit_pytorch, "simple_vit", "SimpleViT", **_VIT), (32, 32)),
    ("vit-pytorch: simple_vit_with_register_tokens", functools.partial(_vit_pytorch,
     "simple_vit_with_register_tokens", "SimpleViT", **_VIT), (32, 32)),
    ("vit-pytorch: simple_vit_with_qk_norm", functools.partial(_vit_pytorch, "simple_vit_with_qk_norm", "SimpleViT",
     **_VIT), (32, 32)),
    ("vit-pytorch: deepvit", functools.partial(_vit_pytorch, "deepvit", "DeepViT", **_VIT), (32, 32)),
    ("vit-pytorch: cait", functools.partial(_vit_pytorch, "cait", "CaiT", **_VIT, cls_depth=1), (32, 32)),
    ("vit-pytorch: parallel_vit", functools.partial(_vit_pytorch, "parallel_vit", "ViT", **_VIT), (32, 32)),
    ("vit-pytorch: vit_for_small_dataset", functools.partial(_vit_pytorch, "vit_for_small_dataset", "ViT", **_VIT),
     (32, 32)),
    ("vit-pytorch: vit_with_patch_merger", functools.partial(_vit_pytorch, "vit_with_patch_merger", "ViT", **_VIT,
     patch_merge_layer=1, patch_merge_num_tokens=4), (32, 32)),
    ("vit-pytorch: cct", functools.partial(_vit_pytorch, "cct", "CCT", img_size=32, embedding_dim=48,
     n_conv_layers=1, num_layers=2, num_heads=3, mlp_ratio=2, num_classes=10, positional_embedding="learnable"),
     (32, 32)),
    ("vit-pytorch: cvt", functools.partial(_vit_pytorch, "cvt", "CvT", num_classes=10, s1_emb_dim=16, s1_depth=1,
     s2_emb_dim=32, s2_heads=2, s2_depth=1, s3_emb_dim=48, s3_heads=3, s3_depth=1), (64, 64)),
    ("vit-pytorch: levit", functools.partial(_vit_pytorch, "levit", "LeViT", image_size=64, num_classes=10, dim=(32,
     48), depth=1, heads=(2, 3), mlp_mult=2, dim_key=8, dim_value=16, stages=2), (64, 64)),
    ("vit-pytorch: vit_nd_rotary", functools.partial(_vit_pytorch, "vit_nd_rotary", "ViTND", ndim=2, input_shape=32,
     patch_size=8, num_classes=10, dim=48, depth=2, heads=3, mlp_dim=96), (32, 32)),
    ("segment-anything: ImageEncoderViT", _segment_anything, (64, 64)),
    ("by hand: nn.TransformerEncoder", _encoder, (32, 32)),
    ("by hand: nn.TransformerEncoder, norm first, GELU", functools.partial(_encoder, norm_first=True,
     activation="gelu"), (32, 32)),
    ("by hand: nn.MultiheadAttention", lambda: Patches(nn.Sequential(OneTensorAttention(), OneTensorAttention())),
     (32, 32)),
    ("by hand: einops and einsum", lambda: Patches(nn.Sequential(EinsumAttention(), EinsumAttention())), (32, 32)),
    ("by hand: layers in lists", lambda: Patches(InLists()), (32, 32)),
]  # fmt: skip


def cases() -> Iterator[Case]:
    """All of them."""
    for name, build, size in _OTHERS:
        yield Case(name, build, size)
