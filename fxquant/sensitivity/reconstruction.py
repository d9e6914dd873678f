"""Reconstruction error of a layer at given bits, measured on images or expected of normal data.

    E(b) = ||Q_b(W) Q_b(X) - W X||_F^2 / ||W X||_F^2

LampQ ("Iterative bit update"). X are the layer's inputs in the float model; nothing is stored but sums.

Expected ratios E(b - 1) / E(b) (Lemma 3) are k(b - 1) / k(b) with k(b) = E[(dW X + W dX + dW dX)^2] for independent
standard normal W and X, quantized uniformly with 2^b levels from -3 to 3, beyond which there is nothing:

    k = 2 E[d^2] + E[d^2]^2 + 2 E[X d]^2 + 4 E[X d] E[d^2]

The moments are exact integrals over the cells of the quantizer. They are the paper's Table 9 to all its digits; of its
Table 2, made from them, the ratios at 4 to 6 and 8 bits follow, those at 2 (82.74, here 87.45), 3 (6.59, here 6.40) and
7 (4.12, here 4.06) do not. Lemma 3 prints W dW for W dX.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node

from fxquant.errors import SensitivityError
from fxquant.graph.annotation import Candidate, annotation_of
from fxquant.graph.nodes import device_of

Pair = tuple[int, int]
"""(weight bits, activation bits)."""


def reconstruction_errors(
    graph_module: GraphModule, wanted: Mapping[Node, Sequence[Pair]], batches: Iterable[Tensor]
) -> dict[Node, dict[Pair, float]]:
    """E of each wanted layer at each wanted pair of bits, summed in float64.

    Args:
        graph_module: with candidates on its nodes.
        wanted: linear layers and convolutions (call_module) with candidates, one input each; an input that stays float
            has no candidates and any activation bits.
        batches: images, float (B, C, H, W).

    Raises SensitivityError for a width without a candidate, or an error that is not finite.
    """
    runner = _Errors(graph_module, wanted)
    with torch.no_grad():
        for batch in batches:
            runner.run(batch.to(device_of(graph_module)))
    found: dict[Node, dict[Pair, float]] = {}
    for node, pairs in wanted.items():
        # A layer whose output is all zero, but for the bias, has nothing to lose.
        signal = max(runner.signal[node], 1e-300)
        found[node] = {pair: runner.noise[node, pair] / signal for pair in pairs}
        for pair, error in found[node].items():
            if not error < float("inf"):
                raise SensitivityError(f"the error of {annotation_of(node).layer} at {pair} bits is not finite")
    return found


class _Errors(Interpreter):
    """Adds up squared errors of wanted layers while the float graph runs."""

    def __init__(self, graph_module: GraphModule, wanted: Mapping[Node, Sequence[Pair]]) -> None:
        super().__init__(graph_module)
        self.wanted = wanted
        self.signal = dict.fromkeys(wanted, 0.0)
        self.noise = {(node, pair): 0.0 for node, pairs in wanted.items() for pair in pairs}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node not in self.wanted:
            return result
        (x, *_), _ = self.fetch_args_kwargs_from_env(node)
        module: Any = self.submodules[str(node.target)]
        weight, (of_weight, of_input) = module.weight, annotation_of(node).operands

        def product(weight: Tensor, x: Tensor) -> Tensor:
            """W X without the bias."""
            bare = {"weight": weight} | ({} if module.bias is None else {"bias": torch.zeros_like(module.bias)})
            output: Tensor = functional_call(module, bare, (x,))
            return output

        exact = product(weight, x)
        self.signal[node] += _energy(exact)
        inputs: dict[int, Tensor] = {}
        for pair in self.wanted[node]:
            weight_bits, activation_bits = pair
            rows = _quantizer(node, of_weight.candidates, weight_bits)(weight.flatten(1))
            if of_input.candidates and activation_bits not in inputs:
                inputs[activation_bits] = _quantizer(node, of_input.candidates, activation_bits)(x)
            x_hat = inputs.get(activation_bits, x)
            self.noise[node, pair] += _energy(product(rows.reshape(weight.shape), x_hat).sub_(exact))
        return result


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _quantizer(node: Node, candidates: Sequence[Candidate], bits: int) -> Any:
    for candidate in candidates:
        if candidate.bits == bits:
            return candidate.quantizer
    raise SensitivityError(f"{annotation_of(node).layer} has no candidate of {bits} bits")


def expected_ratio(bits: int) -> float:
    """E(bits - 1) / E(bits) of normal weights and inputs (Lemma 3, Table 2); bits > 1."""
    return _expected_error(bits - 1) / _expected_error(bits)


@cache
def _expected_error(bits: int) -> float:
    cross, square = normal_moments(bits)
    return 2 * square + square**2 + 2 * cross**2 + 4 * cross * square


def normal_moments(bits: int, clip: float = 3.0) -> tuple[float, float]:
    """E[X d] and E[d^2] of d = Q(X) - X over X ~ N(0, 1) within clip, 2^bits uniform levels (Table 9)."""
    step = 2 * clip / (2**bits - 1)
    cross = square = 0.0
    for index in range(2**bits):
        level = -clip + index * step
        low, high = max(level - step / 2, -clip), min(level + step / 2, clip)
        mass = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
        first = _density(low) - _density(high)
        second = mass + low * _density(low) - high * _density(high)
        cross += level * first - second
        square += level**2 * mass - 2 * level * first + second
    return cross, square


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
