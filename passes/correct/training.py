"""Training of a quantized network towards a float one: what learns, its steps, and the best state so far.

What the loss is and why: `passes.correct.distil`. How ranks share a step out: `passes.correct.micro_batches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule

from fxquant.graph.structure.blocks import with_outputs
from fxquant.quantizers.learned import LearnedCodes, LearnedScale
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.sensitivity.objective import Outputs
from passes.correct.block_error import token_errors
from passes.correct.block_pairs import BlockPairs, activation_quantizers, weight_layers
from passes.correct.held_out import HeldOut, mean_divergence
from passes.correct.micro_batches import backward, cut

if TYPE_CHECKING:
    from passes.correct.distil import Distil

WARM_UP = 0.05  # of the steps
MEMORY = 0.98  # per step, of the running mean
NOMINAL_BITS = 3  # of weights on average, at which steps and rates are as given
IDLE_CHECKS = 2  # two fifths of the steps, by default: what rates do at their highest has shown by then


class Training:
    """The network in training: what learns, the optimizer, and the best state so far.

    Args:
        options: the pass whose options say how to train.
        pairs: the float and the quantized network, and what they are given.
        wanted: by layer the float weight (out, ...) that training starts from; for others it is the layer's own.
        train: indices of images to learn from, int64 (N,).
        held: measures on the images that the best state is chosen by.
    """

    def __init__(
        self, options: Distil, pairs: BlockPairs, wanted: dict[str, Tensor], train: Tensor, held: HeldOut
    ) -> None:
        self.options, self.device, self.images = options, pairs.device, pairs.context.images
        self.objective, self.pictures = pairs.context.objective, pairs.context.pictures
        self.train, self.held = train, held
        self.quantized = pairs.quantized
        self.teacher = with_outputs(pairs.original, [block.result for block in pairs.blocks[:-1]])
        self.student = with_outputs(pairs.quantized, [block.result for block in pairs.blocks[:-1]])
        self.generator = torch.Generator().manual_seed(pairs.context.seed * 1_000_003 + 17)
        self.order = torch.empty(0, dtype=torch.int64)
        self.check = self.step = 0
        self.weights = _learned_codes(pairs, wanted)
        self.rest = _float_rest(pairs, self.student)
        self.places = activation_quantizers(self.student)
        self.scales = [LearnedScale(getattr(owner, name)) for _, owner, name in self.places]
        for (_, owner, name), scale in zip(self.places, self.scales, strict=True):
            setattr(owner, name, scale)
        bits = mean_bits(self.weights.values())
        self.steps = math.ceil(options.steps * NOMINAL_BITS / bits)
        self.optimizer, self.rates = self._optimizer(2 ** (NOMINAL_BITS - bits))
        self.divergences = [self._divergence()]
        self.best, self.mean = self._values(), self._values()

    def _optimizer(self, factor: float) -> tuple[torch.optim.Adam, list[float]]:
        """Adam, and the rate of each of its groups, times a factor: weights, scales, biases and norms."""
        options = self.options
        groups = [
            ([weight.units for weight in self.weights.values()], options.weight_rate),
            ([learned.log_factor for learned in (*self.scales, *self.weights.values())], options.scale_rate),
            (list(self.rest.values()), options.rest_rate),
        ]
        named = [{"params": parameters} for parameters, _ in groups]
        return torch.optim.Adam(named, betas=(0.9, 0.99), fused=True), [rate * factor for _, rate in groups]

    @property
    def is_idle(self) -> bool:
        """Whether the start is still the best after some checks: then more of the same will not do."""
        return self.check >= IDLE_CHECKS and min(self.divergences) == self.divergences[0]

    def advance(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Train up to the next check; `after_step` may keep the state after every step."""
        last = round(self.steps * (self.check + 1) / self.options.checks)
        while self.step < last:
            self._step(self.step)
            torch._foreach_lerp_(self.mean, [value.detach() for value in self._parameters()], 1 - MEMORY)
            self.step += 1
            after_step()
        self.check += 1
        now = self._values()
        found = [(self._divergence(), now)]
        self._take(self.mean)
        found.append((self._divergence(), self._values()))
        self._take(now)
        least, values = min(found, key=lambda pair: pair[0])
        if least < min(self.divergences):
            self.best = values
        self.divergences.append(least)

    def state(self) -> dict[str, Tensor]:
        """All that going on from here depends on."""
        moments = self.optimizer.state_dict()["state"]
        return {
            "check": torch.tensor(self.check),
            "step": torch.tensor(self.step),
            "divergences": torch.tensor(self.divergences, dtype=torch.float64),
            "order": self.order,
            "random": self.generator.get_state(),
            **{f"now.{i}": value for i, value in enumerate(self._values())},
            **{f"best.{i}": value for i, value in enumerate(self.best)},
            **{f"mean.{i}": value.clone() for i, value in enumerate(self.mean)},
            **{f"adam.{i}.{name}": value for i, values in moments.items() for name, value in values.items()},
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        self.check, self.step = int(state["check"]), int(state["step"])
        self.divergences = state["divergences"].tolist()
        self.order = state["order"]
        self.generator.set_state(state["random"])
        self._take([state[f"now.{i}"] for i in range(len(self.best))])
        for name, values in (("best", self.best), ("mean", self.mean)):
            values[:] = [state[f"{name}.{i}"].to(self.device, copy=True) for i in range(len(values))]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("adam."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = value.clone()  # equal ones may share memory
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def finish(self) -> None:
        """Put the best state into the quantized network."""
        self._take(self.best)
        for (_, owner, name), scale in zip(self.places, self.scales, strict=True):
            setattr(owner, name, scale.finish())
        for path, weight in self.weights.items():
            module: Any = self.student.get_submodule(path)
            module.weight_quantizer = weight.finish()
            module.requantize(weight().detach())
        for name, value in self.rest.items():
            path, _, attribute = name.rpartition(".")
            owner, found = self.student.get_submodule(path), value.detach().clone()
            # Not in place: equal tensors of a recalled graph share memory.
            is_parameter = attribute in dict(owner.named_parameters(recurse=False))
            setattr(owner, attribute, nn.Parameter(found, requires_grad=False) if is_parameter else found)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters()]

    def _take(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters(), values, strict=True):
                parameter.copy_(value)

    def _tensors(self) -> dict[str, Tensor]:
        """What the student computes with, by name."""
        return {**self.rest, **{f"{path}.weight": weight() for path, weight in self.weights.items()}}

    def _step(self, step: int) -> None:
        options = self.options
        warm = min(1.0, (step + 1) / (WARM_UP * self.steps + 1))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
        while len(self.order) < options.images:
            more = self.train[torch.randperm(len(self.train), generator=self.generator)]
            self.order = torch.cat([self.order, more])
        chosen, self.order = self.order[: options.images], self.order[options.images :]
        images = self.images[chosen].to(self.device)
        self._descend(options.augment(images, self.generator) if self.pictures else images)

    def _descend(self, images: Tensor) -> None:
        """One step of the optimizer, on a batch (N, C, H, W)."""
        batches = cut(images, self.options.micro_batches)

        def loss_of(number: int, made: dict[str, Tensor]) -> Tensor:
            share = len(batches[number]) / len(images)
            for index, scale in enumerate(self.scales):
                # A scale learns from one micro-batch alone: that saves most of half the quantizer's backward pass.
                scale.counts = 1 / share if index % len(batches) == number else 0.0
            return share * self._loss(batches[number], {**self.rest, **made})

        made = {f"{path}.weight": weight() for path, weight in self.weights.items()}
        learned = [scale.log_factor for scale in self.scales if scale.learns]
        self.optimizer.zero_grad()
        backward("distilling", loss_of, len(batches), made, [*self.rest.values(), *learned])
        self.optimizer.step()

    def _loss(self, images: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """The mean over images (B, C, H, W), float (). tensors: what the student computes with, by name."""
        with self._precision():
            with torch.no_grad():
                wanted, *wanted_features = self.teacher(images)
            found, *features = functional_call(self.student, tensors, (images,))
        loss = mean_divergence(self.objective, self._counting(wanted), self._counting(found))
        if self.options.features:
            errors = [token_errors(a, b) for a, b in zip(wanted_features, features, strict=True)]
            loss = loss + self.options.features * torch.stack(errors).mean()
        return loss

    def _divergence(self) -> float:
        """On the held-out images; infinite where training has left what numbers can hold."""
        return self.held.divergence(self.quantized, tensors=self._tensors())

    def _precision(self) -> torch.autocast:
        kind = self.device.type
        fast = bool(torch.cpu._is_avx512_bf16_supported()) if kind == "cpu" else kind == "cuda"
        return torch.autocast(kind, torch.bfloat16, enabled=fast)

    def _counting(self, output: Any) -> Outputs:
        """The tensors of an output that the objective looks at."""
        return self.objective.outputs(output, "Distil", finite=False)


def mean_bits(weights: Iterable[LearnedCodes]) -> float:
    """Of all weights that learn; NOMINAL_BITS where none does."""
    sizes = [(weight.units.numel(), weight.start.bits) for weight in weights]
    return sum(size * bits for size, bits in sizes) / sum(size for size, _ in sizes) if sizes else NOMINAL_BITS


def _learned_codes(pairs: BlockPairs, wanted: dict[str, Tensor]) -> dict[str, LearnedCodes]:
    """By path, the weights that learn: those of uniform quantizers, from where they start."""
    found = {}
    for node, module, layer in weight_layers(pairs.original, pairs.quantized):
        path, quantizer = str(node.target), module.weight_quantizer
        if isinstance(quantizer, UniformQuantizer):
            found[path] = LearnedCodes(wanted.get(path, layer.weight), quantizer, module.weight_codes)
    return found


def _float_rest(pairs: BlockPairs, student: GraphModule) -> dict[str, nn.Parameter]:
    """By name, what learns in float: parameters of the network that are no constants, and biases of its layers."""
    constants = {node.target for node in student.graph.nodes if node.op == "get_attr"}
    found = {
        name: nn.Parameter(value.detach().clone())
        for name, value in student.named_parameters()
        if name not in constants
    }
    for node, module, _ in weight_layers(pairs.original, pairs.quantized):
        if module.bias is not None:
            found[f"{node.target}.bias"] = nn.Parameter(module.bias.clone())
    return found
