"""Reconstruct: block by block, learn which way weights are rounded and how wide activation quantizers reach.

Each block of the quantized network is trained to give the float block's output: AdaRound's soft rounding (logits a),
one factor on every activation quantizer's scale (straight-through), and biases; QDrop leaves elements of the block's
input and of every quantizer's output in float with probability `drop`. A block's input comes from the blocks already
reconstructed. Sources: BRECQ (Li et al., eq. 10), AdaRound (Nagel et al., eq. 22-25), QDrop (Wei et al., eq. 9),
FIMA-Q (Wu et al.) for the Fisher-weighted loss (`passes.correct.block_error`). How this differs from their 20,000 GPU
steps:

- Few steps: weights start from the closed form (`CorrectWeights`: ridge, then GPTQ), each logit at the grid point the
  closed form chose, and logits learn twenty times as fast as the papers'. `closed_form=None` starts at the float
  weight, as AdaRound does; `rounding_rate=0` keeps the closed form's codes.
- The error is relative to what it is at the start, and the rounding penalty is a mean, so `penalty` has no unit.
- One image in eight is held out. The state of least error there, hard rounded, is kept, the start included: on these
  images no block gets worse. Learning stops when two checks in a row bring nothing.

Learned weights lie on their grid; bits and weight scales stay. Not idempotent: its float targets are those of the
weights it finds, so run it once, and not after CompensateWeights or CorrectWeights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.fx import GraphModule

from fxquant.artefact.cache import signature
from fxquant.checks.devices import device_named
from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from fxquant.graph.facts import Fact
from passes.correct.block_learning import BlockLearning
from passes.correct.block_pairs import BlockPairs, adopt
from passes.correct.correct_weights import CorrectWeights
from passes.correct.micro_batches import check_count
from passes.pipeline.contract import Effect, PassContext
from passes.search.calibrate import STATISTICS
from passes.search.insert_observers import OBSERVED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED


@dataclass(frozen=True)
class Reconstruct:
    """Reconstruct every block.

    Args:
        steps: how many gradient steps each block takes.
        images: how many images each step sees.
        micro_batches: into how many parts, a power of two, these are cut, each with draws of its own; so many ranks at
            most have a share in the training.
        rounding_rate, scale_rate, bias_rate: Adam's rates for the logits of rounding, for the logarithm of activation
            scales, and for biases. The latter two fall by a cosine; a rate of 0 leaves what it is for as it is.
        drop: probability, 0 to 1, that an activation stays float in a step (QDrop).
        penalty: how much soft weights between two points of the grid cost, relative to the error, once `warm_up` is
            over.
        warm_up: share of the steps before the penalty counts, 0 to 1.
        loss: "mse", the mean squared error; or "fisher", weighted by the Fisher information of rank `rank`.
        rank: outer products per image of the Fisher-weighted loss.
        closed_form: what gives the weights that the steps start from; None starts from the float weights.
        checks: how often the held-out error is measured, to keep the best state.
        device: where the blocks are trained, for example "cuda"; None: where the model is.
    """

    steps: int = 100
    images: int = 8
    micro_batches: int = 2
    rounding_rate: float = 0.02
    scale_rate: float = 5e-3
    bias_rate: float = 5e-4
    drop: float = 0.5
    penalty: float = 1.0
    warm_up: float = 0.2
    loss: Literal["mse", "fisher"] = "mse"
    rank: int = 5
    closed_form: CorrectWeights | None = CorrectWeights()
    checks: int = 5
    device: str | None = None

    requires: ClassVar[frozenset[Fact]] = frozenset({OBSERVED, BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = STATISTICS
    effect: ClassVar[Effect] = Effect.WEIGHTS

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if min(self.steps, self.images, self.rank, self.checks) < 1 or not 0 <= self.drop <= 1:
            raise CalibrationError(
                f"steps, images, rank and checks must be at least 1, and drop from 0 to 1; found {self}"
            )
        check_count(self, self.micro_batches)
        rates = self.rounding_rate, self.scale_rate, self.bias_rate, self.penalty
        if min(rates) < 0 or not 0 <= self.warm_up <= 1:
            raise CalibrationError(f"rates and penalty must be at least 0, and warm_up from 0 to 1; found {self}")

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Rewrite weights, biases and activation candidates in place; returns how many layers.

        Notes, per block, the held-out error before and after (`before`, `after`; squared, or Fisher-weighted, relative
        to the float network's), and steps taken. Every block is kept in the context's cache as soon as it is learned.
        """
        pairs = BlockPairs(graph_module, context, None if self.device is None else device_named(self.device))
        key = pairs.signature(repr(self))
        task = context.progress.track("reconstructing blocks", self.steps * len(pairs.blocks))
        notes = []
        for pair in pairs:
            learning = BlockLearning(self, pair, pairs, task)
            values = context.cache.recall_tensors(signature(key, pair.index), learning.run)
            learning.take(values)
            before, after, steps = values["errors"].tolist()
            notes.append({"block": pair.block.name, "before": before, "after": after, "steps": int(steps)})
            task.advance(self.steps - learning.taken)
        task.close()
        context.note(blocks=notes)
        return adopt(graph_module, pairs.quantized)
