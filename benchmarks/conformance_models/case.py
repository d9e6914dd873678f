"""What an architecture is here: a way to build a small instance of it, and the images it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
        name: whose it is and what, such as "timm: vit_tiny_patch16_224, tokens"; what stands before the colon groups
            the rows of the table.
        build: a small instance of it, with any weights.
        size: (height, width) of its images in pixels.
        inputs: further arguments of its forward, which keep these values.
    """

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, int]
    inputs: Mapping[str, Any] = field(default_factory=dict)


class Calling(nn.Module):
    """A model of which another method than its forward is called."""

    def __init__(self, model: nn.Module, method: str, **options: Any) -> None:
        super().__init__()
        self.model, self.method, self.options = model, method, options

    def forward(self, images_bchw: Tensor) -> Any:
        """What the method returns for images (B, C, H, W)."""
        return getattr(self.model, self.method)(images_bchw, **self.options)


@torch.no_grad()
def rescaled(model: nn.Module, images_bchw: Tensor, inputs: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """The model in inference mode with random weights of which all count, where initial ones are often next to nothing.

    Kernels of linear layers and convolutions are normal with one over the root of how many inputs they sum. Gains of
    norms and of LayerScale are about 1, though they may begin at 1e-5. What begins as zero, biases and gates, position
    embeddings and tables of relative positions, is noise. Single numbers, such as temperatures and logarithms of
    scales, stay as they are, but for gates that begin closed. Batch norms have the statistics of these images, as
    trained ones have those of theirs: with their initial ones they do nothing, and values grow from layer to layer
    until softmaxes are saturated (FastViT's scores had a deviation of 2,000), and a small error finds another key.

    Args:
        model: any.
        images_bchw: float (B, C, H, W), which it takes.
        inputs: further arguments of its forward.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    kernels = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and isinstance(module.weight, Tensor)
    }
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_constant = bool((parameter == parameter.flatten()[:1]).all())
        value = float(parameter.flatten()[0]) if parameter.numel() else 0.0
        if parameter.numel() == 1:
            if value == 0:
                parameter.fill_(0.5)
        elif "logit_scale" in name or "temperature" in name:
            continue
        elif id(parameter) in kernels or name.endswith("in_proj_weight"):
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        elif parameter.squeeze().ndim > 1:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(1 + 0.2 * noise if is_constant and value != 0 else 0.2 * noise)
    return _settled(model.eval(), images_bchw, inputs)


def _settled(model: nn.Module, images_bchw: Tensor, inputs: Mapping[str, Any]) -> nn.Module:
    """The model, with statistics of batch norms from one run on these images."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        model(images_bchw, **inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return model


def with_noisy_inputs(model: nn.Module, images: Tensor, inputs: Mapping[str, Any], seed: int) -> Any:
    """The output of the float model whose linear layers and convolutions read inputs that are off by half a step.

    Noise is uniform, of a step of 8 bits of the largest entry: what rounding to 8 bits leaves. What this alone costs is
    the network's: in a deep one of random weights errors add up from layer to layer, and one draw says little.

    Args:
        model: in inference mode.
        images: float (B, C, H, W).
        inputs: further arguments of its forward.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def noisy(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        step = given[0].abs().max() / 127
        return (given[0] + step * (torch.rand(given[0].shape, generator=generator) - 0.5), *given[1:])

    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    hooks = [layer.register_forward_pre_hook(noisy) for layer in layers]
    output = model(images, **inputs)
    for hook in hooks:
        hook.remove()
    return output
