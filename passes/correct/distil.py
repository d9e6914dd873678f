"""Distil: train the quantized network, as a whole, to give the float network's outputs on unlabelled images.

The loss of an image is the objective's divergence between the outputs of the float and the quantized network, for
classifiers KL(p || p^) between their class probabilities (Hinton et al., temperature 1), plus `features` times the mean
over blocks and tokens of |h^ - h|^2 / |h|^2 at the outputs h of blocks. What learns, by Adam: weights, through their
rounding (straight-through, as in quantization-aware training), the scale of every row of weights and of every
activation quantizer (LSQ), biases and norms. Bits stay as allocated. After RotateResidual and FoldSqb the float network
is the folded one, so both speak of the same channels.

Few images would soon be learned by heart. So every step sees other crops and mixtures of them
(`passes/correct/augment.py`), which the float network labels whatever they show, and the outputs of blocks, which say
more about an image than its class probabilities, weigh most. One image in eight is held out, whole, and the state of
least divergence there is kept, the start included; at every check the running mean of what learns is tried too, in
which codes that flip to and fro have settled.

Where the processor multiplies bfloat16 in hardware, products run in it: its rounding is far below that of the
quantizers. State is kept at every check and twice a minute, so an interrupted run goes on from the last one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule

from fxquant import ranks
from fxquant.artefact.cache import Kept
from fxquant.checks.devices import device_named
from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from fxquant.graph.facts import Fact
from passes.correct.augment import Augment
from passes.correct.block_pairs import BlockPairs, adopt
from passes.correct.correct_weights import CorrectWeights
from passes.correct.training import MEMORY, Training, held_out
from passes.pipeline.checkpoint import Checkpoint
from passes.pipeline.contract import Effect, PassContext
from passes.search.calibrate import CALIBRATED
from passes.search.insert_observers import OBSERVED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED

EVERY_S = 30.0  # of training, between two states kept
CLOSED_FORM = 128  # images at most; more hardly help it


@dataclass(frozen=True)
class Distil:
    """Train the quantized network.

    Args:
        steps: how many steps the optimizer takes, where weights have 3 bits on average. At b bits it takes 3 / b of
            them.
        images: how many images each step sees.
        weight_rate, scale_rate, rest_rate: Adam's rates for weights, in steps of their grid; for the logarithms of
            scales; and for biases and norms. They rise over the first twentieth of the steps and then fall by a cosine.
            They hold where weights have 3 bits on average; at b bits they are 2^(3-b) times as large.
        features: how much the blocks' outputs count in the loss, beside the model's output.
        augment: what both networks see of the images.
        closed_form: what gives the weights that training starts from; None starts from their nearest rounding.
        checks: how often the held-out divergence is measured, to keep the best state.
        device: where training runs, for example "cuda"; None: where the model is.

    Not idempotent: its target is the float network of the weights it finds, so no pass that rewrites weights may have
    run before it.
    """

    steps: int = 2000
    images: int = 8
    weight_rate: float = 3.5e-3
    scale_rate: float = 1.5e-3
    rest_rate: float = 7.5e-4
    features: float = 40.0
    augment: Augment = Augment()
    closed_form: CorrectWeights | None = CorrectWeights()
    checks: int = 5
    device: str | None = None

    requires: ClassVar[frozenset[Fact]] = frozenset({OBSERVED, BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset({CALIBRATED})
    effect: ClassVar[Effect] = Effect.WEIGHTS

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if min(self.steps, self.images, self.checks) < 1:
            raise CalibrationError(f"steps, images and checks must be at least 1; found {self}")
        if min(self.weight_rate, self.scale_rate, self.rest_rate, self.features) < 0:
            raise CalibrationError(f"rates and the weight of features must be at least 0; found {self}")

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Rewrite weights, biases, scales and the float rest in place; returns how many layers have new weights.

        Notes the held-out divergence (in the unit of the objective; None where it is not finite) at the start and at
        every check, and the check that was kept.
        """
        context.objective.check(graph_module, "Distil")
        pairs = BlockPairs(graph_module, context, None if self.device is None else device_named(self.device))
        key = pairs.signature(repr(self), MEMORY)
        checkpoint = Checkpoint(context.cache, key, EVERY_S)
        task = context.progress.track("distilling", self.checks)
        kept = checkpoint.load()
        train, held = held_out(len(context.images))
        wanted: dict[str, Tensor] = {}
        if kept is None and self.closed_form is not None:
            for pair in pairs.over(context.images[train[:CLOSED_FORM]]):
                wanted |= {found.layer: found.weight for found in self.closed_form.recalled(pair, pairs, key)}
        training = Training(self, pairs, wanted, train, held)
        if kept is not None:
            training.restore(kept[1])
            task.advance(training.check)

        def state() -> Kept:
            return {}, training.state()

        def train_to_next_check() -> int:
            training.advance(lambda: checkpoint.save(state))
            checkpoint.save(state, last=True)
            return training.check

        # One rank trains: sums over a step's few images would else depend on how many ranks there are.
        while training.check < self.checks:
            training.check = ranks.once("distilling", train_to_next_check)
            task.advance()
        task.close()
        training.restore(ranks.once("distilling", training.state))
        divergences = training.divergences
        numbers = [found if math.isfinite(found) else None for found in divergences]
        context.note(divergences=numbers, kept_check=divergences.index(min(divergences)))
        training.finish()
        return adopt(graph_module, pairs.quantized)
