"""The descent of images from noise, and what it goes down (PSAQ-ViT).

    loss = - sum_l H_l + CE(logits, a random label) + w |V - V*|

H_l: entropy of patch similarities at the output of attention l (`priors`); V: variation between neighbouring pixels,
V* drawn once an image. Adam (0.5, 0.9) in two stages, the second with twice the jitter; every step sees the images
shifted and perhaps flipped. Images do not influence each other, so they are made in chunks that bound memory.

V* is the paper's: its code asks that four Frobenius norms of differences over 32 x 3 x 224 x 224 normalised pixels sum
to 2500..3000. Per pixel, and in units of the picture's range 0..1, that is a root mean square difference of 0.064 to
0.077, whatever the number of images and channels and the normalisation. Smaller pictures vary more from pixel to pixel:
0.099 at 56 x 56 and 0.117 at 28 x 28 (photographs of Tiny ImageNet, averaged down), so V* is taken times
(224 / side)^(1/4). The weight w is the paper's .05 in its own units. After each step pixels are held in the range that
a picture can have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from fxquant.errors import CalibrationError
from fxquant.graph.annotation import Role, nodes_with_role
from fxquant.graph.nodes import device_of
from fxquant.synthesis.pictures import PAPER_NORMS, PAPER_STD, Pictures, Synthesis
from fxquant.synthesis.priors import similarity_entropy, variation

_LEAST_PATCHES = 3


class Watched(Interpreter):
    """Runs the graph and keeps the outputs of attentions over at least three patches."""

    def __init__(self, traced: GraphModule) -> None:
        super().__init__(traced)
        self.dtype = next((parameter.dtype for parameter in traced.parameters()), torch.float32)
        self.device = device_of(traced)
        self.outputs: list[Tensor] = []
        self.prefix = {node: count for node in nodes_with_role(traced, Role.AV) for count in _prefix(traced, node)}
        if not self.prefix:
            raise CalibrationError(
                "this model has no attention over patches, whose outputs the images would be made from: give "
                "calibration images"
            )

    def run_node(self, node: Node) -> Any:
        """The node's value; of an attention, what its patches look like is noted."""
        result = super().run_node(node)
        if node in self.prefix:
            self.outputs.append(similarity_entropy(result, self.prefix[node]))
        return result

    def losses(self, images_bchw: Tensor, labels_b: Tensor) -> Tensor:
        """CE - sum of entropies, float (B,)."""
        self.outputs = []
        output = self.run(images_bchw)
        logits = (output[0] if isinstance(output, tuple | list) else output).float()
        entropy = torch.stack([found.view(len(images_bchw), -1).mean(1) for found in self.outputs]).sum(0)
        self.outputs = []
        if logits.ndim != 2:
            return -entropy
        return functional.cross_entropy(logits, labels_b % logits.shape[1], reduction="none") - entropy


def _prefix(traced: GraphModule, node: Node) -> Iterator[int]:
    """How many tokens before the patches an attention's output has: those that the patch embedding did not make.

    Nothing where too few patches are left, as in an attention pool, which has one query.
    """
    tokens = node.meta["tensor_meta"].shape[-2]
    prefix = 0
    for embedding in nodes_with_role(traced, Role.PATCH_EMBED):
        patches = embedding.meta["tensor_meta"].shape[2:].numel()
        # Windows and later stages have fewer tokens than there are patches, and none in front.
        prefix = tokens - patches if 0 < tokens - patches < patches else 0
    if tokens - prefix >= _LEAST_PATCHES:
        yield prefix


class Chunk:
    """Some of the images, and where their descent stands. Every random draw follows the image's index and the step.

    Args:
        watched: the model whose losses the images descend.
        pictures: what images the model takes.
        options: how images are made.
        seed: of every random draw.
        indices: which of all images these are.
    """

    def __init__(self, watched: Watched, pictures: Pictures, options: Synthesis, seed: int, indices: range) -> None:
        self.watched, self.pictures, self.options, self.seed = watched, pictures, options, seed
        self.step = 0
        draws = [torch.Generator().manual_seed(seed * 1_000_003 + index) for index in indices]
        noise = torch.stack([torch.randn(*pictures.shape, generator=g) for g in draws]).to(watched.device)
        self.labels = torch.cat([torch.randint(0, 2**31, (1,), generator=g) for g in draws]).to(watched.device)
        least, most = options.variation
        scale = (224 / math.sqrt(pictures.shape[1] * pictures.shape[2])) ** 0.25
        share = torch.cat([torch.rand(1, generator=g) for g in draws])
        self.target = (scale * (share * (most - least) + least)).to(watched.device)
        self.std = torch.tensor(pictures.std).view(1, -1, 1, 1).to(watched.device)
        self.low, self.high = (limit.to(watched.device) for limit in pictures.limits)
        self.images = noise.clamp(self.low, self.high)
        self.first, self.second = torch.zeros_like(noise), torch.zeros_like(noise)

    def advance(self) -> None:
        """One step of Adam."""
        stage, step = divmod(self.step, self.options.steps)
        if step == 0:
            self.first, self.second = torch.zeros_like(self.first), torch.zeros_like(self.second)
        images = self.images.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.watched.losses(self._moved(images, stage).to(self.watched.dtype), self.labels)
            paper_units = PAPER_NORMS / PAPER_STD
            off_target = (variation(images * self.std) - self.target).abs() * paper_units
            (gradient,) = torch.autograd.grad((losses + 0.05 * off_target).sum(), images)
        self.first = 0.5 * self.first + 0.5 * gradient
        self.second = 0.9 * self.second + 0.1 * gradient.square()
        corrected = (self.second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8
        move = self.first / (1 - 0.5 ** (step + 1)) / corrected
        self.images = (images.detach() - self._learning_rate(step) * move).clamp(self.low, self.high)
        self.step += 1

    def _learning_rate(self, step: int) -> float:
        """Warm-up over a fifth of the stage, then a cosine to zero."""
        warm_up = max(self.options.steps // 5, 1)
        if step < warm_up:
            return self.options.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / max(self.options.steps - warm_up, 1)
        return self.options.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def _moved(self, images: Tensor, stage: int) -> Tensor:
        """Shifted around the edges by up to the jitter, half of it in the first stage, and flipped every other time."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_009 + self.step)
        most = [int(self.options.jitter * (stage + 1) / 2 * side) for side in images.shape[2:]]
        shifts = [int(torch.randint(-reach, reach + 1, (1,), generator=draw)) for reach in most]
        moved = torch.roll(images, shifts, (2, 3))
        return moved.flip(3) if torch.rand(1, generator=draw) < 0.5 else moved

    def state(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """For the cache: what `resume` needs."""
        return {"step": str(self.step)}, {"images": self.images, "first": self.first, "second": self.second}

    def resume(self, found: tuple[dict[str, str], dict[str, Tensor]] | None) -> None:
        """Go on from a state kept; one that does not fit counts as absent."""
        texts, tensors = found or ({}, {})
        step = texts.get("step", "")
        if step.isdecimal() and all(
            name in tensors and tensors[name].shape == self.images.shape for name in ("images", "first", "second")
        ):
            self.step = int(step)
            kept = (tensors[name].to(self.watched.device) for name in ("images", "first", "second"))
            self.images, self.first, self.second = kept
