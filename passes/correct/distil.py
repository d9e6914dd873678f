"""Distil: train the quantized network, as a whole, to give the float network's outputs on unlabelled images.

The loss of an image is the objective's divergence between the outputs of the float and the quantized network, for
classifiers KL(p || p^) between their class probabilities (Hinton et al., temperature 1), plus `features` times the mean
over blocks and tokens of |h^ - h|^2 / |h|^2 at the outputs h of blocks. What learns, by Adam: weights, through their
rounding (straight-through, as in quantization-aware training), the scale of every row of weights and of every
activation quantizer (LSQ), biases and norms. Bits stay as allocated. After RotateResidual and FoldSqb the float network
is the folded one, so both speak of the same channels.

Few images would soon be learned by heart. So every step sees other crops and mixtures of them
(`passes/search/augment.py`), which the float network labels whatever they show, and the outputs of blocks, which say
more about an image than its class probabilities, count too. One image in eight is held out, whole, and the state of
least divergence there is kept, the start included; at every check the running mean of what learns is tried too, in
which codes that flip to and fro have settled. Where two checks have found nothing better than the start, training ends.

The start is `rounding`'s network, in which blocks have the closed form's weights where that is closer on the images
held out (`passes.correct.start`). So with CompensateWeights for the rounding, the result is there never further from
the float network than what the same pipeline gives with CompensateWeights in this pass's place.

Where the processor multiplies bfloat16 in hardware, the products of training run in it: its rounding is far below that
of the quantizers. State is kept at every check and twice a minute, so an interrupted run goes on from the last one.
"""

from __future__ import annotations

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
from passes.correct.block_pairs import BlockPairs, adopt
from passes.correct.compensate_weights import CompensateWeights
from passes.correct.correct_weights import CorrectWeights
from passes.correct.held_out import HeldOut, held_out
from passes.correct.micro_batches import check_count
from passes.correct.start import correct_where_it_pays, finite
from passes.correct.training import MEMORY, Training
from passes.pipeline.checkpoint import Checkpoint
from passes.pipeline.contract import Effect, PassContext
from passes.search.augment import Augment
from passes.search.calibrate import STATISTICS
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
        micro_batches: into how many parts, a power of two, these are cut. A process alone has one in memory at a time,
            and so many ranks at most have a share in the training. Every activation scale learns from one of them, and
            the number decides how sums are rounded. The more there are, the longer a small model takes alone.
        weight_rate, scale_rate, rest_rate: Adam's rates for weights, in steps of their grid; for the logarithms of
            scales; and for biases and norms. They rise over the first twentieth of the steps and then fall by a cosine.
            They hold where weights have 3 bits on average; at b bits they are 2^(3-b) times as large.
        features: how much the blocks' outputs count in the loss, beside the model's output.
        augment: what both networks see of the images, where these are pictures.
        rounding: what gives the weights that training starts from; None: their nearest rounding. It needs
            `SearchScales(keep_grams=True)`.
        closed_form: what gives the weights of blocks in which these are closer on held-out images; None: of none.
        checks: how often the held-out divergence is measured, to keep the best state.
        device: where training runs, for example "cuda"; None: where the model is.

    Not idempotent: its target is the float network of the weights it finds, so no pass that rewrites weights may have
    run before it.
    """

    steps: int = 300
    images: int = 8
    micro_batches: int = 2
    weight_rate: float = 3.5e-3
    scale_rate: float = 1.5e-3
    rest_rate: float = 7.5e-4
    features: float = 5.0
    augment: Augment = Augment()
    rounding: CompensateWeights | None = None
    closed_form: CorrectWeights | None = CorrectWeights()
    checks: int = 5
    device: str | None = None

    effect: ClassVar[Effect] = Effect.WEIGHTS

    @property
    def requires(self) -> frozenset[Fact]:
        """Bits; and what the rounding needs."""
        known = frozenset({OBSERVED, BITS_ALLOCATED})
        return known if self.rounding is None else known | self.rounding.requires

    @property
    def provides(self) -> frozenset[Fact]:
        """Nothing."""
        return frozenset()

    @property
    def breaks(self) -> frozenset[Fact]:
        """What observers have gathered, of the weights as they were."""
        return STATISTICS

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if min(self.steps, self.images, self.checks) < 1:
            raise CalibrationError(f"steps, images and checks must be at least 1; found {self}")
        check_count(self, self.micro_batches)
        if min(self.weight_rate, self.scale_rate, self.rest_rate, self.features) < 0:
            raise CalibrationError(f"rates and the weight of features must be at least 0; found {self}")

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Rewrite weights, biases, scales and the float rest in place; returns how many layers have new weights.

        Notes the held-out divergence (in the unit of the objective; None where it is not finite) at the start and at
        every check, and the check that was kept; and what `correct_where_it_pays` notes of the start.
        """
        context.objective.check(graph_module, "Distil")
        pairs = BlockPairs(graph_module, context, None if self.device is None else device_named(self.device))
        if self.rounding is not None:
            self.rounding.apply(graph_module, context)
            pairs.take(graph_module)
        key = pairs.signature(repr(self), MEMORY)
        train, others = held_out(len(context.images))
        held = HeldOut(pairs, others, self.images)
        wanted: dict[str, Tensor] = {}
        if self.closed_form is not None:
            wanted = correct_where_it_pays(pairs, self.closed_form, train[:CLOSED_FORM], held, key)
        checkpoint = Checkpoint(context.cache, key, EVERY_S)
        task = context.progress.track("distilling", self.checks)
        training = Training(self, pairs, wanted, train, held)
        kept = checkpoint.load()
        if kept is not None:
            training.restore(kept[1])
            task.advance(training.check)

        def state() -> Kept:
            return {}, training.state()

        while training.check < self.checks and not training.is_idle:
            training.advance(lambda: checkpoint.save(state))
            checkpoint.save(state, last=True)
            task.advance()
        task.close()
        training.restore(ranks.once("distilling", training.state))  # whatever rounds otherwise on a rank, one result
        divergences = training.divergences
        kept_check = divergences.index(min(divergences))
        context.note(divergences=[finite(found) for found in divergences], kept_check=kept_check)
        training.finish()
        return adopt(graph_module, pairs.quantized)
