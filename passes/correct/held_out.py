"""How far a quantized network is from the float one on images that nothing is fitted to.

Measured in float32, as the simulated model computes: with products in bfloat16, which training has, a network of 3 bits
is up to a tenth further away, since codes flip.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxquant import ranks
from fxquant.sensitivity.objective import Objective, Outputs
from passes.correct.block_pairs import BlockPairs

HELD_OUT = 8  # one image in so many


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """Indices of images to train on and to check on, int64; the same where there are too few."""
    held = torch.arange(count) % HELD_OUT == HELD_OUT - 1
    train = torch.nonzero(~held)[:, 0]
    return train, torch.nonzero(held)[:, 0] if bool(held.any()) else train


class HeldOut:
    """Measures networks against the float one of the pairs.

    Args:
        pairs: the float and the quantized network.
        indices: of the calibration images to measure on, int64 (N,).
        together: images at a time.
    """

    def __init__(self, pairs: BlockPairs, indices: Tensor, together: int) -> None:
        self.device, self.objective, self.together = pairs.device, pairs.context.objective, together
        self.images = pairs.context.images[indices]
        self.reference = self._outputs(pairs.original, self.images, {}, finite=True)

    def divergence(
        self, network: nn.Module, inputs: Tensor | None = None, tensors: dict[str, Tensor] | None = None
    ) -> float:
        """The objective's divergence, mean over images; infinite where the outputs are beyond what numbers can hold.

        Args:
            network: what gives the model's output, and perhaps more after it.
            inputs: what it is given for the held-out images, float (N, ...), in their order; None: the images.
            tensors: by name, what it computes with in place of its own.
        """
        outputs = self._outputs(network, self.images if inputs is None else inputs, tensors or {}, finite=False)
        found = float(mean_divergence(self.objective, self.reference, outputs))
        return found if math.isfinite(found) else math.inf

    @torch.no_grad()
    def _outputs(self, network: nn.Module, inputs: Tensor, tensors: dict[str, Tensor], finite: bool) -> Outputs:
        """What counts of the outputs that a network gives for all inputs; ranks share the batches out."""

        def counting(batch: Tensor) -> Outputs:
            output: Any = functional_call(network, tensors, (batch.to(self.device),))
            outputs = self.objective.outputs(output, "Distil", finite)
            return tuple(tensor.contiguous() for tensor in outputs)  # as they come from another rank

        found = ranks.dealt("measuring what is held out", counting, torch.split(inputs, self.together))
        return tuple(torch.cat([each.to(self.device) for each in batches]) for batches in zip(*found, strict=True))


def mean_divergence(objective: Objective, wanted: Outputs, found: Outputs) -> Tensor:
    """The objective's divergence between outputs, mean over images, float ().

    Args:
        objective: what quantization must keep.
        wanted: of the float network, each (B, ...), float of any width.
        found: of the other, alike.
    """
    as_float = [tuple(tensor.float() for tensor in outputs) for outputs in (wanted, found)]
    return objective.divergence(as_float[0], as_float[1]) / len(wanted[0])
