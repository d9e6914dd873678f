"""Calibration images made from the model alone, by descent from noise (PSAQ-ViT; LampQ, Table 5).

The descent is in `descent`. Not done: choosing bits of the softmax; that is the recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import ranks
from fxquant.artefact.cache import Cache, code_signature, signature
from fxquant.checks.hints import checked
from fxquant.checks.torch_modes import exact
from fxquant.errors import BY_ARGUMENT, CalibrationError, OptionError
from fxquant.graph.capture.tracing import trace
from fxquant.graph.nodes import device_of
from fxquant.report.progress import shown
from fxquant.synthesis.descent import Chunk, Watched
from fxquant.synthesis.pictures import Pictures, Synthesis
from passes.pipeline.contract import PassContext, check_draws
from passes.pipeline.pipeline import Pipeline
from passes.pipeline.progress import ProgressReporter
from passes.prepare.assign_roles import AssignRoles


@checked(OptionError, **BY_ARGUMENT, options=CalibrationError)
@exact()
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
    given = {"images to make": repr(options), "pictures": repr(pictures), "seed": seed, "batch size": batch_size}
    with ranks.together(lambda: {**given, "model": signature(traced)}), shown(progress) as reporter:
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
        chunk = Chunk(watched, pictures, options, seed, indices)
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
        found = ranks.dealt("synthesising images", finished, chunks)
        return torch.cat([images.to(device_of(traced)) for images in found]).to(watched.dtype)
    finally:
        task.close()
