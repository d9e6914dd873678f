"""Learning of one block of a quantized network: what learns, its steps, and the best state so far.

What the loss is and why: `passes.correct.reconstruct`. How ranks share a step out: `passes.correct.micro_batches`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxquant import ranks
from fxquant.quantizers.learned import LearnedScale, SoftRounding, scale_of
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.simulated import quantize_rows
from passes.correct.block_error import BlockError, block_error
from passes.correct.block_pairs import BlockPair, BlockPairs
from passes.correct.held_out import held_out
from passes.correct.micro_batches import backward, cut
from passes.pipeline.progress import ProgressTask

if TYPE_CHECKING:
    from passes.correct.reconstruct import Reconstruct


class BlockLearning:
    """The reconstruction of one block.

    Args:
        options: the pass whose options say how it learns.
        pair: the block in both networks.
        pairs: the pairs that it belongs to.
        task: told of every step.
    """

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
        inputs, indices = cut(x, self.options.micro_batches), cut(images, self.options.micro_batches)
        seeds = torch.randint(1 << 62, (len(inputs),), generator=self.generator).tolist()

        def loss_of(number: int, made: dict[str, Tensor]) -> Tensor:
            self.drops.manual_seed(seeds[number])
            output = functional_call(self.pair.quantized, {**made, **self.biases}, (inputs[number],))
            return self.error_of(output, indices[number]) * (len(indices[number]) / len(images))

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
