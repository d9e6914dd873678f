"""How far a quantized block's output is from the float block's: squared, or as the rest of the network sees it.

Fisher: F = J^T E[v v^T] J of the float rest of the network at the quantized block's output, v the objective's random
cotangents, as the mean of its diagonal over images and, image by image, `rank` outer products of random gradients (as
in Calibrate); FIMA-Q (Wu et al.) takes gradients of the KL divergence itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fxquant import ranks
from fxquant.graph.structure.blocks import extract
from fxquant.sensitivity.objective import Draws
from passes.correct.block_pairs import BlockPair, BlockPairs

BlockError = Callable[[Tensor, Tensor], Tensor]
"""The error of an output (B, ...) for the images (B,) of these indices, relative to the target's power."""


def block_error(pair: BlockPair, pairs: BlockPairs, loss: Literal["mse", "fisher"], rank: int) -> BlockError:
    """The error of one block.

    Args:
        pair: the block in both networks.
        pairs: the pairs that it belongs to, with the images.
        loss: "mse", the mean squared error; "fisher", weighted by the Fisher information.
        rank: outer products per image, of the Fisher-weighted one.
    """
    target = pair.target
    if loss == "mse":
        power = target.square().mean().clamp_min(1e-30)
        return lambda output, images: (output - target[images]).square().mean() / power
    gradients, diagonal = _fisher(pair, pairs, rank)
    scale = (diagonal * target.square().mean(0)).sum().clamp_min(1e-30)

    def error(output: Tensor, images: Tensor) -> Tensor:
        missing = (output - target[images]).flatten(1)
        along = (gradients[:, images].to(missing.dtype).flatten(2) * missing).sum(2).square().mean()
        return 0.5 * (along + (missing.square() * diagonal.flatten()).sum(1).mean()) / scale

    return error


def _fisher(pair: BlockPair, pairs: BlockPairs, rank: int) -> tuple[Tensor, Tensor]:
    """Gradients (rank, N, ...) in bfloat16 and the mean over images of their squares (...), float32."""
    context, needed_by = pairs.context, 'Reconstruct(loss="fisher")'
    context.objective.check(pairs.original, needed_by)
    result = pairs.blocks[-1].result
    rest = extract(pairs.original, pair.block.result, result)
    outputs = pairs.run(pair.quantized, pair.quantized_input)

    def of_batch(first: int) -> Tensor:
        batch = outputs[first : first + context.batch_size].clone().requires_grad_()
        reached = context.objective.outputs(rest(batch), needed_by)
        rows = []
        for (gradient,) in context.objective.gradients(reached, [batch], Draws(rank, context.seed, first)):
            rows.append(torch.zeros_like(batch) if gradient is None else gradient)
        return torch.stack(rows).bfloat16()

    found = ranks.dealt("gathering gradients", of_batch, range(0, len(outputs), context.batch_size))
    gradients = torch.cat([batch.to(pairs.device) for batch in found], dim=1)
    return gradients, gradients.float().square().mean((0, 1))


def token_errors(wanted: Tensor, found: Tensor) -> Tensor:
    """Mean over tokens of |found - wanted|^2 / |wanted|^2, float (); both (..., channels)."""
    power = wanted.float().square().sum(-1)
    power = power.clamp_min(1e-3 * float(power.mean()) + 1e-30)  # tokens of padding
    return ((found.float() - wanted.float()).square().sum(-1) / power).mean()
