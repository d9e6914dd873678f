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

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule

from fxquant import ranks
from fxquant.artefact.cache import signature
from fxquant.checks.devices import device_named
from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from fxquant.graph.facts import Fact
from fxquant.quantizers.learned import LearnedScale, SoftRounding, scale_of
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.simulated import quantize_rows
from passes.correct.block_error import BlockError, block_error
from passes.correct.block_pairs import BlockPair, BlockPairs, adopt
from passes.correct.correct_weights import CorrectWeights
from passes.correct.held_out import held_out
from passes.correct.step_parts import backward, check_parts, cut
from passes.pipeline.contract import Effect, PassContext
from passes.pipeline.progress import ProgressTask
from passes.search.calibrate import STATISTICS
from passes.search.insert_observers import OBSERVED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED


@dataclass(frozen=True)
class Reconstruct:
    """Reconstruct every block.

    Args:
        steps: how many gradient steps each block takes.
        images: how many images each step sees.
        parts: into how many parts, a power of two, these are cut, each with draws of its own; so many ranks at most
            have a share in the training.
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
    parts: int = 4
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
        check_parts(self, self.parts)
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
            learning = _Learning(self, pair, pairs, task)
            values = context.cache.recall_tensors(signature(key, pair.index), learning.run)
            learning.take(values)
            before, after, steps = values["errors"].tolist()
            notes.append({"block": pair.block.name, "before": before, "after": after, "steps": int(steps)})
            task.advance(self.steps - learning.taken)
        task.close()
        context.note(blocks=notes)
        return adopt(graph_module, pairs.quantized)


class _Learning:
    """The reconstruction of one block."""

    def __init__(self, options: Reconstruct, pair: BlockPair, pairs: BlockPairs, task: ProgressTask) -> None:
        self.options, self.pair, self.pairs, self.task = options, pair, pairs, task
        self.generator = torch.Generator().manual_seed(pairs.context.seed * 1_000_003 + pair.index)
        self.drops = torch.Generator()
        self.train, self.held = held_out(len(pair.target))
        self.taken = 0
        self.error_of: BlockError
        self.roundings: dict[str, SoftRounding] = {}
        self.biases: dict[str, nn.Parameter] = {}
        self.scales: list[LearnedScale] = []

    def run(self) -> dict[str, Tensor]:
        """Learn; returns the tensors that `take` wants and `errors`: before, after, steps taken."""
        self.error_of = block_error(self.pair, self.pairs, self.options.loss, self.options.rank)
        before = self._held_error({})
        starts, codes = self._closed_form(before)
        self._let_learn(starts, codes)
        places = self.pair.quantizers()
        self.scales = [LearnedScale(getattr(m, name), self.options.drop, self.drops) for _, m, name in places]
        for (_, owner, name), scale in zip(places, self.scales, strict=True):
            setattr(owner, name, scale)
        try:
            after = self._descend()
        finally:
            for (_, owner, name), scale in zip(places, self.scales, strict=True):
                setattr(owner, name, scale.start)
        found = {**self._found(), "errors": torch.tensor([before, after, self.taken], dtype=torch.float64)}
        return ranks.once("reconstructing blocks", lambda: found)

    def _modules(self) -> dict[str, Any]:
        """The block's quantized layers, by path."""
        return {str(node.target): module for node, module, _ in self.pair.layers()}

    def _closed_form(self, before: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By path, the float weights that rounding starts from, and the codes where a closed form chose them.

        before: the held-out error as it is; corrections that do not lower it are taken back.
        """
        starts = {str(node.target): layer.weight.detach() for node, _, layer in self.pair.layers()}
        if self.options.closed_form is None:
            return starts, {}
        modules = self._modules()
        untouched = {path: _tensors(module) for path, module in modules.items()}
        corrections = self.options.closed_form.correct(self.pair, self.pairs, self.train)
        if self._held_error({}) <= before:
            starts |= {correction.layer: correction.weight for correction in corrections}
        else:
            for path, (weight, bias) in untouched.items():
                _set(modules[path], weight, bias)
        codes = {
            path: quantize_rows(module.weight, module.weight_quantizer)
            for path, module in modules.items()
            if module.weight_quantizer is not None
        }
        return starts, codes

    def _let_learn(self, starts: dict[str, Tensor], codes: dict[str, Tensor]) -> None:
        """Make what learns of weights and biases, from these starts and codes."""
        for path, module in self._modules().items():
            quantizer = module.weight_quantizer
            if isinstance(quantizer, UniformQuantizer) and self.options.rounding_rate:
                self.roundings[path] = SoftRounding(starts[path], quantizer, codes.get(path))
            if module.bias is not None and self.options.bias_rate:
                self.biases[f"{path}.bias"] = nn.Parameter(module.bias.clone())

    def _found(self) -> dict[str, Tensor]:
        """Weights, biases and scales as they are after learning, by name."""
        found = {
            f"{path}.{name}": tensor
            for path, module in self._modules().items()
            for name, tensor in zip(("weight", "bias"), _tensors(module), strict=True)
            if tensor is not None
        }
        found |= {name: tensor.detach() for name, tensor in self._hard().items()}
        for (path, _, name), scale in zip(self.pair.quantizers(), self.scales, strict=True):
            learned = scale_of(scale.finish())
            if learned is not None:
                found[f"{path}.{name}.scale"] = learned
        return found

    def take(self, values: dict[str, Tensor]) -> None:
        """Put learned weights, biases and scales into the quantized block."""
        for name, value in values.items():
            path, _, attribute = name.rpartition(".")
            module: Any = self.pair.quantized.get_submodule(path)
            if attribute == "scale":
                module.scale.copy_(value)
            elif attribute == "weight":
                module.requantize(value.to(self.pairs.device))
            elif attribute == "bias":
                module.bias = value.to(self.pairs.device)

    def _hard(self) -> dict[str, Tensor]:
        """Weights, hard rounded, and biases by name, as `functional_call` takes them."""
        return {**{f"{path}.weight": rounding.hard() for path, rounding in self.roundings.items()}, **self.biases}

    def _descend(self) -> float:
        """Take the steps, leave the best state behind; returns its held-out error."""
        options, pair = self.options, self.pair
        optimizer, rates = self._optimizer()
        best, best_state, idle = self._checked(), self._state(), 0
        interval = max(1, options.steps // options.checks)
        for step in range(options.steps):
            for group, (rate, falls) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * step / options.steps) if falls else 1.0)
            order = torch.randperm(len(self.train), generator=self.generator)
            images = self.train[order[: options.images]]
            kept = torch.rand(pair.float_input[images].shape, generator=self.generator).to(self.pairs.device)
            x = torch.where(kept < options.drop, pair.float_input[images], pair.quantized_input[images])
            optimizer.zero_grad()
            self._backward(x, images, step / options.steps)
            optimizer.step()
            self.taken += 1
            self.task.advance()
            if self.taken % interval == 0 or self.taken == options.steps:
                error = self._checked()
                if error < best:
                    best, best_state, idle = error, self._state(), 0
                elif step > options.warm_up * options.steps:
                    idle += 1
                if idle >= 2:
                    break
        for parameter, value in zip(self._learned(), best_state, strict=True):
            parameter.data.copy_(value)
        return best

    def _backward(self, x: Tensor, images: Tensor, progress: float) -> None:
        """The gradients of a step on inputs (N, ...) of the images (N,), of which ranks share out the error's.

        progress: the share of the steps that have been taken.
        """
        inputs, indices = cut(x, self.options.parts), cut(images, self.options.parts)
        seeds = torch.randint(1 << 62, (len(inputs),), generator=self.generator).tolist()

        def loss_of(part: int, made: dict[str, Tensor]) -> Tensor:
            self.drops.manual_seed(seeds[part])
            output = functional_call(self.pair.quantized, {**made, **self.biases}, (inputs[part],))
            return self.error_of(output, indices[part]) * (len(indices[part]) / len(images))

        penalty = self._penalty(progress)
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        learned = [scale.log_factor for scale in self.scales if scale.learns]
        made = {f"{path}.weight": rounding() for path, rounding in self.roundings.items()}
        backward("reconstructing blocks", loss_of, len(inputs), made, [*self.biases.values(), *learned])

    def _optimizer(self) -> tuple[torch.optim.Adam, list[tuple[float, bool]]]:
        """Adam, and for each group its rate and whether it falls."""
        options = self.options
        factors = [scale.log_factor for scale in self.scales if scale.learns and options.scale_rate]
        groups = [
            (self._logits(), options.rounding_rate, False),
            (factors, options.scale_rate, True),
            (list(self.biases.values()), options.bias_rate, True),
        ]
        used = [group for group in groups if group[0]]
        return torch.optim.Adam([{"params": p, "lr": r} for p, r, _ in used]), [(r, falls) for _, r, falls in used]

    def _logits(self) -> list[Tensor]:
        return [rounding.logits for rounding in self.roundings.values()]

    def _learned(self) -> list[Tensor]:
        return [*self._logits(), *self.biases.values(), *(scale.log_factor for scale in self.scales)]

    def _state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._learned()]

    def _penalty(self, progress: float) -> Tensor | None:
        """AdaRound's penalty as a mean over all weights of the block; beta falls from 20 to 2 after the warm-up, before
        which there is none.
        """
        roundings = list(self.roundings.values())
        if progress < self.options.warm_up or not roundings:
            return None
        beta = 20 - 18 * (progress - self.options.warm_up) / (1 - self.options.warm_up)
        count = sum(rounding.logits.numel() for rounding in roundings)
        return self.options.penalty * torch.stack([rounding.penalty(beta) for rounding in roundings]).sum() / count

    def _checked(self) -> float:
        """The held-out error with hard rounding and nothing dropped."""
        for scale in self.scales:
            scale.eval()
        error = self._held_error(self._hard())
        for scale in self.scales:
            scale.train()
        return error

    def _held_error(self, tensors: dict[str, Tensor]) -> float:
        def error(images: Tensor) -> float:
            output = functional_call(self.pair.quantized, tensors, (self.pair.quantized_input[images],))
            return float(self.error_of(output, images)) * len(images)

        with torch.no_grad():
            batches = torch.split(self.held, self.pairs.context.batch_size)
            return sum(ranks.dealt("measuring what is held out", error, batches)) / len(self.held)


def _tensors(module: Any) -> tuple[Tensor, Tensor | None]:
    return module.weight.clone(), None if module.bias is None else module.bias.clone()


def _set(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    module.requantize(weight)
    module.bias = bias
