"""Observers: identity nodes on the edges that will be quantized, and the statistics they gather.

What is quantized, and of which families, an operand says (`fxquant.graph.annotation`); an observer gathers what these
families ask for. `Calibrate` feeds it. It keeps streamed statistics only, never activations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError, DistributedError
from fxquant.graph.annotation import Allowed, Source
from fxquant.quantizers.families import FAMILIES
from fxquant.quantizers.family import Family, Statistics
from fxquant.quantizers.statistics.gram import Gram
from fxquant.quantizers.statistics.histogram import Bfloat16Histogram
from fxquant.quantizers.statistics.output_gram import OutputGram

# What an observer gathers: all that `release` forgets.
_COUNTS = ("images", "row_length", "coherence_count")
_NUMBERS = (*_COUNTS, "minimum", "maximum", "image_minimum_sum", "token_weight_sum", "coherence_sum")
_TENSORS = ("channel_magnitude", "channel_factor", "output_weight")
# Those that have states of their own, and how each is made.
_STREAMED: dict[str, Callable[[], Bfloat16Histogram | Gram | OutputGram]] = {
    "histogram": Bfloat16Histogram,
    "row_histogram": Bfloat16Histogram,
    "gram": Gram,
    "output_gram": OutputGram,
}

# How two observers' numbers become one's.
_MERGED = {"row_length": max, "minimum": min, "maximum": max}  # the others are sums


class Observer(nn.Module):
    """Passes its input through. `update` gathers what the quantizer families ask for.

    Args:
        families: of what will be its quantizer; none where the edge stays float (its linear layer still needs the Gram
            matrix).
        source: what the observed operand holds, such as values after a softmax.
        gram: whether to gather the Gram matrix of the inputs.
    """

    def __init__(self, families: tuple[Allowed, ...], source: Source, gram: bool) -> None:
        super().__init__()
        self.families, self.source, self.keeps_gram = families, source, gram
        self.owner: int | None = None
        self._owner_has_gram = False
        self.release()

    @property
    def has_gram(self) -> bool:
        """Whether the Gram matrix of the inputs has been gathered, and is here or with the owner."""
        return self.gram is not None or (self.owner is not None and self._owner_has_gram)

    def leave_to(self, rank: int, has_gram: bool, is_here: bool) -> None:
        """Let a rank of several own what was gathered: only there is it kept.

        Args:
            rank: the owner, which `owner` says from now on, on all ranks, until all is released.
            has_gram: whether a Gram matrix is among it.
            is_here: whether this is the owner.
        """
        if not is_here:
            self.release()
        self.owner, self._owner_has_gram = rank, has_gram

    def check_here(self) -> None:
        """Raise DistributedError where another rank has what was gathered."""
        if self.owner is not None and not self.images and self.gram is None:
            raise DistributedError(
                f"what this observer of {self.source} has gathered is with rank {self.owner} alone: search and round "
                f"on the same ranks that have calibrated, or calibrate again"
            )

    def released_grams(self) -> tuple[Tensor, Tensor | None]:
        """The Gram matrices of the inputs, float (in, in), and of the gradients at the reading layer's output, float
        (groups, outputs, outputs), None where they were not asked for. The observer forgets both with all else.

        Raises CalibrationError where it has none, DistributedError where another rank has them.
        """
        self.check_here()
        if self.gram is None:
            raise CalibrationError("this observer has no Gram matrix: Calibrate gathers it, for inputs of weights only")
        gram = self.gram.matrix()
        outputs = None if self.output_gram is None else self.output_gram.matrix()
        self.release()
        return gram, outputs

    def release(self, keep_gram: bool = False) -> None:
        """Forget all statistics, or all but the Gram matrices, and free their memory."""
        self.owner = self.owner if keep_gram else None
        self.histogram: Bfloat16Histogram | None = None
        self.row_histogram: Bfloat16Histogram | None = None
        self.row_length = 0
        self.minimum, self.maximum = float("inf"), float("-inf")
        self.image_minimum_sum, self.images = 0.0, 0
        self.channel_magnitude: Tensor | None = None
        self.channel_factor: Tensor | None = None
        self.gram: Gram | None = self.gram if keep_gram else None
        self.output_gram: OutputGram | None = self.output_gram if keep_gram else None
        self.output_weight: Tensor | None = None
        self.token_weight_sum = 0.0
        self.coherence_sum, self.coherence_count = 0.0, 0

    @property
    def asks_for_channels(self) -> bool:
        """Whether channels are grouped before anything else is gathered."""
        return bool(self.families) and all(rule.by_channel for rule in self._rules())

    @property
    def asks_for_coherence(self) -> bool:
        """Whether errors of a family's small values are alike, or it is compared with one whose rows sum to one."""
        rules = self._rules()
        return any(rule.coherent for rule in rules) or {rule.of_rows for rule in rules} == {True, False}

    def _rules(self) -> list[Family]:
        return [FAMILIES[family.name] for family in self.families]

    def forward(self, x: Tensor) -> Tensor:
        """Identity."""
        return x

    def measure_channels(self, x: Tensor) -> None:
        """First phase of O-2SF: largest magnitude per channel (last dimension) of x."""
        magnitude = x.detach().abs().reshape(-1, x.shape[-1]).amax(0)
        previous = self.channel_magnitude
        self.channel_magnitude = magnitude if previous is None else torch.maximum(previous, magnitude)

    def settle_channels(self) -> None:
        """End of the first phase of O-2SF: group channels."""
        rule = self._rules()[0].by_channel
        if self.channel_magnitude is not None and rule is not None:
            self.channel_factor = rule(self.channel_magnitude)

    def update(self, x: Tensor, weight: Tensor | None) -> None:
        """Add one batch of values x (B, ...) and, under the Hessian-guided metric, their weights h (same shape)."""
        x = x.detach()
        per_image = x.reshape(len(x), -1).amin(1)
        self.minimum = min(self.minimum, float(per_image.min()))
        self.maximum = max(self.maximum, float(x.max()))
        self.image_minimum_sum += float(per_image.double().sum())
        self.images += len(x)
        if not self.families:
            return
        if self.channel_factor is not None:
            x = x / self.channel_factor
            weight = None if weight is None else weight * self.channel_factor.square()
        of_rows = {rule.of_rows for rule in self._rules()}
        if False in of_rows:
            self.histogram = self.histogram or Bfloat16Histogram(x.device)
            self.histogram.update(x, weight)
        if True in of_rows:
            self._update_rows(x, weight)

    def _update_rows(self, x: Tensor, weight: Tensor | None) -> None:
        """Values relative to the largest of their row; an error of theirs counts with its square."""
        self.row_length = max(self.row_length, x.shape[-1])
        largest = x.amax(-1, keepdim=True).clamp(1e-15, 1e15)  # float32 holds the square
        mass = largest.square().expand_as(x)
        self.row_histogram = self.row_histogram or Bfloat16Histogram(x.device)
        self.row_histogram.update(x / largest, None if weight is None else weight * mass, mass)

    def update_coherence(self, coherence: float) -> None:
        """Add one batch's coherence (see `SortedMoments.errors`)."""
        self.coherence_sum += coherence
        self.coherence_count += 1

    def update_gram(
        self, rows_ti: Tensor, squared_to: Tensor | None, shrinkage: float = 0.0, share: float = 1.0
    ) -> None:
        """Add one batch to G = sum a_t x_t x_t^T.

        Args:
            rows_ti: inputs, float (tokens, in).
            squared_to: squares of dL/dO, float (tokens, out); None: all are one.
            shrinkage: how far the a_t are drawn towards their mean, from 0 to 1; their sum stays.
            share: what the batch counts, all a_t are multiplied by it.
        """
        rows = rows_ti.detach()
        if squared_to is None:
            token_weight = torch.full((len(rows),), share, device=rows.device)
        else:
            squared = squared_to.detach()
            token_weight = squared.mean(1) * share
            token_weight = token_weight.lerp(token_weight.mean(), shrinkage)
            total = squared.sum(0).double() * share
            self.output_weight = total if self.output_weight is None else self.output_weight + total
        self.token_weight_sum += float(token_weight.double().sum())
        self.gram = self.gram or Gram(rows.shape[1], rows.dtype, rows.device)
        self.gram.add(rows, token_weight)

    def add_output_gram(self, gram_goo: Tensor) -> None:
        """Add the Gram matrix of one image's gradients at the output of the layer that reads the edge.

        gram_goo: float (groups, outputs, outputs), see `fxquant.quantizers.statistics.output_gram`.
        """
        self.output_gram = self.output_gram or OutputGram()
        self.output_gram.add(gram_goo)

    def state(self) -> dict[str, Tensor]:
        """All statistics gathered so far, by name."""
        numbers = torch.tensor([getattr(self, name) for name in _NUMBERS], dtype=torch.float64)
        found = {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None}
        for name in _STREAMED:
            streamed = getattr(self, name)
            if streamed is not None:
                found |= {f"{name}.{part}": tensor for part, tensor in streamed.state().items()}
        return {"numbers": numbers, **found}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        for name, value in zip(_NUMBERS, state["numbers"].tolist(), strict=True):
            setattr(self, name, int(value) if name in _COUNTS else value)
        for name in _TENSORS:
            setattr(self, name, state.get(name))
        for name, make in _STREAMED.items():
            parts = _parts(name, state)
            streamed = make() if parts else None
            if streamed is not None:
                streamed.restore(parts)
            setattr(self, name, streamed)

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the statistics of further images, given by the state of an observer whose channels are grouped alike."""
        for name, value in zip(_NUMBERS, state["numbers"].tolist(), strict=True):
            merged = _MERGED.get(name, operator.add)(getattr(self, name), value)
            setattr(self, name, int(merged) if name in _COUNTS else merged)
        for name, join in (("channel_magnitude", torch.maximum), ("output_weight", torch.add)):
            own, other = getattr(self, name), state.get(name)
            if other is not None:
                setattr(self, name, other if own is None else join(own, other))
        for name, make in _STREAMED.items():
            streamed, parts = getattr(self, name), _parts(name, state)
            if parts and streamed is None:
                streamed = make()
                streamed.restore(parts)
                setattr(self, name, streamed)
            elif parts:
                streamed.merge(parts)

    def channel_weight(self) -> Tensor | None:
        """b_o (out,), float32: how much more than average the loss cares for each output channel; None if unknown."""
        if self.output_weight is None:
            return None
        return (self.output_weight / max(self.token_weight_sum, 1e-300)).float()

    def statistics(self) -> Statistics:
        """What the families see. Raises CalibrationError when the observer has seen nothing."""
        rows = None if self.row_histogram is None else self.row_histogram.finish()
        moments = rows if self.histogram is None else self.histogram.finish()
        if moments is None or not self.images:
            raise CalibrationError(f"an observer of {self.source} has no statistics: run Calibrate before SearchScales")
        factor = self.channel_factor
        low, high = self.minimum, self.maximum
        if factor is not None:
            low, high = float(moments.values[0]), float(moments.values[-1])
        coherence = self.coherence_sum / max(self.coherence_count, 1)
        return Statistics(
            moments, low, high, self.image_minimum_sum / self.images, factor, coherence, rows, self.row_length
        )

    def extra_repr(self) -> str:
        """Families and source."""
        return f"{'|'.join(family.name for family in self.families) or None}, {self.source}"


def _parts(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a state has of a histogram or Gram matrix of this name, as that names it."""
    return {key.partition(".")[2]: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
