"""Small models for tests of passes, with weights that are not their symmetric initial values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from allocators.uniform import Uniform
from fxquant.data import embedded
from fxquant.graph.capture.tracing import trace
from fxquant.session.compiled import Compiled
from fxquant.session.session import Session
from passes.pipeline.contract import PassContext
from passes.prepare.assign_roles import AssignRoles

VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}
SWIN = {"img_size": 56, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 7}


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with every parameter random, LayerNorm's gain and offset too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            is_gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.5 * noise if is_gain else noise * (0.3 if parameter.ndim > 1 else 0.5))
    return model.eval()


def timm_model(name: str, **options: Any) -> nn.Module:
    return scrambled(timm.create_model(name, **options))


def vit(**options: Any) -> nn.Module:
    return timm_model("vit_tiny_patch16_224", **{**VIT, **options})


def images(count: int = 6, size: int = 32, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def traced(model: nn.Module, images_bchw: Tensor) -> GraphModule:
    """Traced, with roles."""
    graph_module = trace(model, images_bchw[:2])
    AssignRoles().apply(graph_module, PassContext())
    return graph_module


Builder = Callable[[], tuple[nn.Module, int]]

ONE_BLOCK = "vit, one block"
SHALLOW: dict[str, Builder] = {
    ONE_BLOCK: lambda: (vit(depth=1), 32),
    "deit3, one block": lambda: (timm_model("deit3_small_patch16_224", **{**VIT, "depth": 1}), 32),
    # Two blocks are the fewest of which one has shifted windows.
    "swin that pads, three blocks": lambda: (
        timm_model("swin_tiny_patch4_window7_224", **{**SWIN, "depths": (2, 1)}),
        56,
    ),
}
"""For what takes long with every layer, as exporting does."""

ARCHITECTURES: dict[str, Builder] = {
    "vit": lambda: (vit(), 32),
    "vit, average pool and fc_norm": lambda: (vit(global_pool="avg", fc_norm=True, class_token=False), 32),
    "vit without qkv bias": lambda: (vit(qkv_bias=False), 32),
    "deit distilled": lambda: (timm_model("deit_tiny_distilled_patch16_224", **VIT), 32),
    "beit": lambda: (timm_model("beit_base_patch16_224", **VIT), 32),
    "deit3": lambda: (timm_model("deit3_small_patch16_224", **VIT), 32),
    "swin that pads": lambda: (timm_model("swin_tiny_patch4_window7_224", **SWIN), 56),
    "swin": lambda: (timm_model("swin_tiny_patch4_window7_224", **{**SWIN, "img_size": 32}), 32),
}


def built(architecture: str) -> tuple[nn.Module, int]:
    """One of `ARCHITECTURES` or `SHALLOW`, and the size of its images."""
    return (SHALLOW.get(architecture) or ARCHITECTURES[architecture])()


@functools.cache
def compiled(architecture: str, budget: str = "W4A6", recipe: str = "mptq_vit", fully: bool = False) -> Compiled:
    """The architecture with every layer at the same bits, 4 or 6; made once a process, not to be changed."""
    model, size = built(architecture)
    options: dict[str, Any] = {"bits": (4, 6), **({"fully_quantized": True} if fully else {})}
    session = Session(model, images(4, size), recipe=recipe, card={"note": "a test"}, **options)
    return session.compile(budget, Uniform())


def embedded_blocks(count: int, load: Callable[[], Any] = embedded.load_model) -> nn.Module:
    """The embedded model, cut after `count` of its 6 blocks: real weights where depth has no say."""
    model = load()
    model.blocks = model.blocks[:count]
    return model


@functools.cache
def embedded_session(recipe: str = "best", count: int = 8) -> Session:
    """The embedded model with so many images: calibrated and searched once a process, whatever the budget.

    Few widths, for they are what takes long.
    """
    return Session(embedded.load_model(), embedded.calibration_images(count), recipe=recipe, bits=(3, 4, 5, 8))


@functools.cache
def embedded_compiled(budget: str = "W4A4", recipe: str = "best", count: int = 8) -> Compiled:
    """The embedded model, quantized; made once a process, not to be changed."""
    return embedded_session(recipe, count).compile(budget)
