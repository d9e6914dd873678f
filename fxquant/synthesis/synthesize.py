"""Calibration images made from the model alone, by descent from noise (PSAQ-ViT; LampQ, Table 5).

    loss = - sum_l H_l + CE(logits, a random label) + w |V - V*|

H_l: entropy of patch similarities at the output of attention l (`priors`); V: variation between neighbouring pixels,
V* drawn once an image. Adam (0.5, 0.9) in two stages, the second with twice the jitter; every step sees the images
shifted and perhaps flipped. Images do not influence each other, so they are made in chunks that bound memory.

V* is the paper's: its code asks that four Frobenius norms of differences over 32 x 3 x 224 x 224 normalised pixels sum
to 2500..3000. Per pixel, and in units of the picture's range 0..1, that is a root mean square difference of 0.064 to
0.077, whatever the number of images and channels and the normalisation. Smaller pictures vary more from pixel to pixel:
0.099 at 56 x 56 and 0.117 at 28 x 28 (photographs of Tiny ImageNet, averaged down), so V* is taken times
(224 / side)^(1/4). The weight w is the paper's .05 in its own units. After each step pixels are held in the range that
a picture can have. Not done: choosing bits of the softmax; that is the recipe's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from fxquant import ranks
from fxquant.artefact.cache import Cache, code_signature, signature
from fxquant.checks.arguments import whole
from fxquant.checks.hints import check_fields, checked
from fxquant.errors import BY_ARGUMENT, CalibrationError, OptionError
from fxquant.graph.annotation import Role, nodes_with_role
from fxquant.graph.capture.tracing import known_image_shape, trace
from fxquant.graph.nodes import device_of
from fxquant.report.progress import shown
from fxquant.synthesis.priors import similarity_entropy, variation
from passes.pipeline.contract import PassContext, check_draws
from passes.pipeline.pipeline import Pipeline
from passes.pipeline.progress import ProgressReporter
from passes.prepare.assign_roles import AssignRoles

_PAPER_NORMS = 4 * math.sqrt(32 * 3 * 224 * 224)  # sum of four norms for a root mean square difference of 1
_PAPER_STD = 0.226  # of the normalisation its pixels are in (ImageNet's, mean over channels)
_LEAST_PATCHES = 3
_LARGEST_SIDE = 16_384


@dataclass(frozen=True)
class Synthesis:
    """How calibration images are made.

    Args:
        count: how many images are made.
        steps: how many steps each of the two stages takes. The paper takes 500 (`Synthesis.thorough()`); from the
            default on, accuracy after quantization rises by no more than its standard error
            (docs/explanation/methods.md).
        learning_rate: Adam's rate on normalised pixels; the paper takes 0.25 for Swin.
        variation: the range V* is drawn from at 224 x 224, in units of the picture's range.
        jitter: largest shift in the second stage, as a share of the image's side.
        image_shape: (channels, height, width), where the model does not say.
        mean, std: of the model's normalisation, per channel, where the model does not say.
        checkpoint_steps: after how many steps unfinished work is kept, where there is a cache.
    """

    count: int = 32
    steps: int = 30
    learning_rate: float = 0.2
    variation: tuple[float, float] = (
        2500 / _PAPER_NORMS * _PAPER_STD,
        3000 / _PAPER_NORMS * _PAPER_STD,
    )
    jitter: float = 30 / 224
    image_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    checkpoint_steps: int = field(default=25, compare=False)

    @classmethod
    def thorough(cls, count: int = 32) -> Synthesis:
        """The paper's 2 x 500 steps."""
        return cls(count=count, steps=500)

    def __post_init__(self) -> None:
        """Raise CalibrationError for options out of range."""
        check_fields(self, CalibrationError)
        least, most = self.variation
        for name in ("count", "steps", "checkpoint_steps"):
            whole(name, getattr(self, name), CalibrationError, least=1, most=1_000_000)
        if self.image_shape is not None and not 1 <= min(self.image_shape) <= max(self.image_shape) <= _LARGEST_SIDE:
            raise CalibrationError(
                f"image_shape is (channels, height, width), each 1 to {_LARGEST_SIDE:,}, found {self}"
            )
        if not self.learning_rate > 0 or not 0 <= least <= most or not 0 <= self.jitter < 1:
            raise CalibrationError(
                f"learning_rate must be above 0, variation a range of numbers from 0 on, and jitter "
                f"at least 0 and below 1; found {self}"
            )

    def described(self, seed: int) -> str:
        """For the protocol card."""
        return f"synthesised (PSAQ-ViT, {self.count} images, 2 x {self.steps} steps, seed {seed})"


@dataclass(frozen=True)
class Pictures:
    """What the model takes.

    Args:
        shape: (channels, height, width) of an image.
        mean, std: per channel, what pixels of 0..1 are normalised with.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, options: Synthesis = Synthesis()) -> Pictures:
        """What the options say, else what the model says: its patch embedding, `pretrained_cfg` or `default_cfg`.

        Without a word on normalisation, mean and std are 0.5. Raises CalibrationError where the shape is not known.
        """
        found = options.image_shape or known_image_shape(model)
        if found is None or len(found) != 3:
            raise CalibrationError(
                f"the image size of {type(model).__name__} is not known (no patch_embed.img_size, no pretrained_cfg): "
                "give calibration images, or calibration=Synthesis(image_shape=(channels, height, width))"
            )
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        channels, height, width = found
        given = [options.mean or config.get("mean"), options.std or config.get("std")]
        numbers = [tuple(map(float, value))[:channels] if value else (0.5,) * channels for value in given]
        if any(len(value) != channels for value in numbers) or min(numbers[1]) <= 0:
            raise CalibrationError(f"mean and std need {channels} numbers, std positive; found {numbers}")
        return cls((channels, height, width), numbers[0], numbers[1])

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """The normalised values of black and white, float32 (1, channels, 1, 1) each."""
        mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (self.mean, self.std))
        return -mean / std, (1 - mean) / std


@checked(OptionError, **BY_ARGUMENT, options=CalibrationError)
@torch.inference_mode(False)
def synthesize(
    model: nn.Module,
    options: Synthesis = Synthesis(),
    *,
    seed: int = 0,
    batch_size: int = 8,
    cache: str | PathLike[str] | None = None,
    progress: ProgressReporter | bool | None = None,
) -> Tensor:
    """Calibration images for a Vision Transformer: (count, C, H, W) in the model's dtype and where it is, normalised.

    Args:
        model: a Vision Transformer; it is not changed.
        options: how images are made.
        seed: of noise, labels, targets and jitter.
        batch_size: images at a time; bounds memory, changes results by float rounding only.
        cache: folder that keeps finished images and the state of unfinished ones, so that a second call, or one after
            an interruption, goes on from there.
        progress: where it reports how far it is: True draws a bar on stderr, False draws none, None draws one where
            stderr is a terminal or a notebook; or an object with the methods of ProgressReporter.

    Raises CalibrationError where the image size is not known or the model has no attention over patches; ModelError,
    TraceError or CoverageError where it cannot be traced.
    """
    seed, batch_size = check_draws(seed, batch_size)
    pictures = Pictures.of(model, options)
    traced = Pipeline([AssignRoles()]).run(trace_without_images(model, pictures), PassContext())
    with shown(progress) as reporter:
        return synthesize_for(traced, pictures, options, seed, batch_size, Cache(cache), reporter)


def trace_without_images(model: nn.Module, pictures: Pictures, inputs: Mapping[str, Any] | None = None) -> GraphModule:
    """The traced model, from noise of the right shape. Raises as `fxquant.trace`.

    Args:
        model: what is traced.
        pictures: the shape of an image.
        inputs: see `fxquant.trace`.
    """
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    noise = torch.randn(2, *pictures.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return trace(model, noise, inputs=inputs)


def synthesize_for(
    traced: GraphModule,
    pictures: Pictures,
    options: Synthesis,
    seed: int,
    batch_size: int,
    cache: Cache,
    progress: ProgressReporter,
) -> Tensor:
    """`synthesize` for a model that is traced and has roles, and takes such pictures; the graph module is not changed.

    Args: see `synthesize`.
    """
    watched = Watched(traced)
    settings = {key: value for key, value in asdict(options).items() if key != "checkpoint_steps"}
    key = signature(traced, traced.code, code_signature(), torch.__version__, settings, asdict(pictures), seed)
    chunks = [range(first, min(first + batch_size, options.count)) for first in range(0, options.count, batch_size)]
    total = 2 * options.steps
    task = progress.track(f"synthesising {options.count} images", total * len(chunks))

    def finished(indices: range) -> Tensor:
        chunk = _Chunk(watched, pictures, options, seed, indices)
        chunk_key = signature(key, list(indices))
        chunk.resume(cache.read(chunk_key))
        task.advance(chunk.step)
        while chunk.step < total:
            chunk.advance()
            task.advance()
            if chunk.step % options.checkpoint_steps == 0 or chunk.step == total:
                cache.write(chunk_key, *chunk.state())
        return chunk.images

    try:
        return torch.cat(ranks.dealt("synthesising images", finished, chunks)).to(watched.dtype)
    finally:
        task.close()


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


class _Chunk:
    """Some of the images, and where their descent stands. Every random draw follows the image's index and the step."""

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
            paper_units = _PAPER_NORMS / _PAPER_STD
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
