"""CorrectWeights: weights and biases that make up for quantized inputs, in closed form (ridge regression, as in ERQ).

With X the float network's inputs of a layer, X^ the quantized network's (quantized prefix, quantized input) and
E = W X + b - (W X^ + b) what is missing at its output, the correction is

    D = argmin sum_t a_t |E_t - D x^_t|^2 + lambda |D|^2 = (sum a E x^^T) (sum a x^ x^^T + lambda I)^-1,

W* = W + D (Zhong et al., ERQ, eq. 5-7; there without token weights, and X^ differs from X by the layer's own
quantizer only). x^ has a last entry 1, whose column of D corrects the bias. Only the two matrices are kept.

- Layers are corrected in graph order, each after the ones before it, so targets are always float and inputs always as
  they will be.
- Token weights a_t = min(1, median / |x_t|^2), median over the image's tokens: without them a few massive tokens (a
  hundred times the rest) own the regression.
- lambda, relative to the mean diagonal, is chosen for each layer by cross-validation over folds of images, on the
  weight as it is after rounding; "no correction" is one of the choices.

Then the weight is rounded: to nearest, or by GPTQ with the same matrix of quantized inputs. Scales stay as searched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import ranks
from fxquant.artefact.cache import signature
from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from fxquant.graph.facts import Fact
from fxquant.graph.rows import gradient_rows, has_rows, weight_rows
from fxquant.graph.structure.blocks import extract
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.simulated import QuantizedWeightModule
from passes.correct.block_pairs import BlockPair, BlockPairs, adopt
from passes.correct.compensate_weights import compensate
from passes.pipeline.contract import Effect, PassContext
from passes.search.calibrate import STATISTICS
from passes.search.insert_observers import OBSERVED
from passes.substitute.substitute_quantizers import BITS_ALLOCATED


@dataclass(frozen=True)
class Correction:
    """What one layer got.

    Args:
        layer: the path of the layer's module.
        ridge: the strength of the ridge that was chosen; None where no correction was best.
        heldout_error: weighted squared error at its output over images left out, after rounding to nearest, relative to
            that of the uncorrected weight.
        weight: the corrected float weight before rounding, shape of the layer's.
    """

    layer: str
    ridge: float | None
    heldout_error: float
    weight: Tensor


@dataclass(frozen=True)
class CorrectWeights:
    """Correct the weights of every linear layer and ungrouped convolution that has weight bits.

    Args:
        ridges: values of lambda to choose from, relative to the mean diagonal. With none, weights are only rounded.
        rounding: "nearest", or "gptq": column by column as CompensateWeights does it, on plain quantized inputs.
        dampening: what GPTQ adds to the diagonal, relative to its mean.
        folds: how many parts the images are cut into for cross-validation; with fewer images, each is a part.
        robust: whether a massive token counts no more than a usual one.

    Not idempotent: the float targets are those of the weights it finds.
    """

    ridges: tuple[float, ...] = (0.01, 0.1, 1.0, 3.0, 10.0, 30.0)
    rounding: Literal["nearest", "gptq"] = "gptq"
    dampening: float = 0.05
    folds: int = 4
    robust: bool = True

    requires: ClassVar[frozenset[Fact]] = frozenset({OBSERVED, BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = STATISTICS
    effect: ClassVar[Effect] = Effect.WEIGHTS

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if self.folds < 2 or any(ridge <= 0 for ridge in self.ridges) or self.dampening <= 0:
            raise CalibrationError(f"folds must be at least 2, and every ridge and dampening above 0; found {self}")

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Rewrite weights and biases in place; returns how many layers. Notes each layer's ridge and error."""
        pairs = BlockPairs(graph_module, context)
        task = context.progress.track("correcting weights", len(pairs.blocks))
        notes, key = [], pairs.signature(repr(self))
        for pair in pairs:
            notes += [
                {"layer": found.layer, "ridge": found.ridge, "heldout_error": found.heldout_error}
                for found in self.recalled(pair, pairs, key)
            ]
            task.advance()
        task.close()
        context.note(layers=notes)
        return adopt(graph_module, pairs.quantized)

    def recalled(self, pair: BlockPair, pairs: BlockPairs, key: str, images: Tensor | None = None) -> list[Correction]:
        """`correct`, kept block by block, so that a process that takes the place of a killed one repeats one at most.

        Args:
            pair: the block in both networks.
            pairs: the pairs that it belongs to, with the images.
            key: signature of all that the correction depends on besides the block's index.
            images: int64 (n,), indices of the calibration images to learn from; None: all of them.
        """

        def make() -> dict[str, Tensor]:
            return _to_tensors(self.correct(pair, pairs, images), pair)

        return _taken(pairs.context.cache.recall_tensors(signature(key, pair.index), make), pair)

    def correct(self, pair: BlockPair, pairs: BlockPairs, images: Tensor | None = None) -> list[Correction]:
        """Correct and round the layers of the pair's quantized block, in graph order.

        Args:
            pair: the block in both networks.
            pairs: the pairs that it belongs to, with the images.
            images: int64 (n,), indices of the calibration images to learn from; None: all of them.
        """
        images = torch.arange(len(pair.float_input)) if images is None else images
        corrections: list[Correction] = []
        for node, module, layer in pair.layers():
            quantizer = module.weight_quantizer
            if not isinstance(quantizer, UniformQuantizer) or not has_rows(layer):
                continue
            found = self._moments(pair, torch.split(images, pairs.context.batch_size), node.name, module, layer)
            weight = layer.weight.detach().flatten(1).double()
            ridge, error = self._choose(weight, found, quantizer)
            change = torch.zeros_like(found.missing[0]) if ridge is None else found.solve(ridge)
            corrected = (weight + change[:, :-1]).float()
            wanted = corrected.reshape(layer.weight.shape)
            if self.rounding == "gptq":
                corrected = compensate(corrected, found.inputs.sum(0)[:-1, :-1], quantizer, self.dampening)
            module.requantize(corrected.reshape(layer.weight.shape))
            if module.bias is not None and ridge is not None:
                rounded = module.weight.flatten(1).double() - weight
                module.bias = (module.bias + found.mean_missing(rounded)).to(module.bias.dtype)
            corrections.append(Correction(str(node.target), ridge, error, wanted))
        return corrections

    def _moments(
        self,
        pair: BlockPair,
        batches: Sequence[Tensor],
        name: str,
        module: QuantizedWeightModule,
        layer: nn.Linear | nn.Conv2d,
    ) -> Moments:
        """What the regression of one layer needs, streamed over the images; every rank has folds of its own."""
        low = extract(pair.quantized, pair.block.source, _input_name(pair.quantized, name))
        high = extract(pair.original, pair.block.source, name)
        weight = layer.weight.detach().flatten(1)
        bias = 0.0 if layer.bias is None else layer.bias.detach()
        folds = min(self.folds, sum(len(batch) for batch in batches))

        def of_folds(mine: range) -> Moments:
            found = Moments.empty(len(mine), weight)
            order = itertools.count()
            with torch.no_grad():
                for images in batches:
                    x = module.quantized_input(low(pair.quantized_input[images]))
                    rows: Any = weight_rows(layer, x)
                    wanted = gradient_rows(layer, high(pair.float_input[images]))
                    missing = (wanted - rows @ weight.T - bias).reshape(len(images), -1, len(weight))
                    rows = rows.reshape(len(images), -1, rows.shape[1])
                    for x_ti, missing_to in zip(rows, missing, strict=True):
                        fold = next(order) % folds
                        if fold in mine:
                            weights = token_weights(x_ti) if self.robust else None
                            found.add(mine.index(fold), x_ti, missing_to, weights)
            return found

        shares = [range(first, folds, ranks.count()) for first in range(ranks.count())]
        return Moments.interleaved(ranks.dealt("correcting weights", of_folds, shares), weight.device)

    def _choose(self, weight: Tensor, found: Moments, quantizer: UniformQuantizer) -> tuple[float | None, float]:
        """The ridge of least cross-validated error after rounding (None: no correction), and that relative error."""
        nothing = torch.zeros_like(found.missing[0])
        folds = range(len(found.inputs))

        def cost(change: Tensor, fold: int) -> float:
            rounded = quantizer((weight + change[:, :-1]).float()).double() - weight
            return found.error(torch.cat([rounded, change[:, -1:]], 1), fold)

        def trial(choice: tuple[float | None, int]) -> float:
            ridge, fold = choice
            return cost(nothing if ridge is None else found.solve(ridge, without=fold), fold)

        choices: list[float | None] = [None, *self.ridges]
        trials = ranks.dealt("choosing ridges", trial, [(ridge, fold) for ridge in choices for fold in folds])
        costs = {ridge: sum(trials[at : at + len(folds)]) for at, ridge in zip(
            range(0, len(trials), len(folds)), choices, strict=True
        )}  # fmt: skip
        best = min(costs, key=lambda ridge: costs[ridge])
        return best, costs[best] / max(costs[None], 1e-300)


def _to_tensors(corrections: list[Correction], pair: BlockPair) -> dict[str, Tensor]:
    """Corrections, and what they have made of their layers."""
    found: dict[str, Tensor] = {}
    for correction in corrections:
        module: Any = pair.quantized.get_submodule(correction.layer)
        ridge = math.nan if correction.ridge is None else correction.ridge
        numbers = torch.tensor([ridge, correction.heldout_error], dtype=torch.float64)
        kept = {"numbers": numbers, "wanted": correction.weight, "codes": module.weight_codes, "bias": module.bias}
        found |= {f"{correction.layer}/{name}": tensor for name, tensor in kept.items() if tensor is not None}
    return found


def _taken(tensors: dict[str, Tensor], pair: BlockPair) -> list[Correction]:
    """The corrections that `_to_tensors` was given, in graph order, put into their layers."""
    corrections = []
    for node, module, layer in pair.layers():
        path, device = str(node.target), layer.weight.device
        if f"{path}/codes" not in tensors:
            continue
        module.weight_codes = tensors[f"{path}/codes"].to(device)
        module.refresh()
        if module.bias is not None:
            module.bias = tensors[f"{path}/bias"].to(device)
        ridge, error = tensors[f"{path}/numbers"].tolist()
        wanted = tensors[f"{path}/wanted"].to(device)
        corrections.append(Correction(path, None if math.isnan(ridge) else ridge, error, wanted))
    return corrections


@dataclass
class Moments:
    """Sums over tokens of one layer, in float64, one slice for every fold of images.

    Args:
        inputs: sum a x^ x^^T (folds, in + 1, in + 1).
        missing: sum a E x^^T (folds, out, in + 1).
        energy: sum a |E|^2 (folds,). x^ ends with a 1.
    """

    inputs: Tensor
    missing: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, folds: int, weight_oi: Tensor) -> Moments:
        """All zero, for a weight (out, in)."""
        rows, columns = weight_oi.shape
        zeros = [torch.zeros(folds, *shape, dtype=torch.float64, device=weight_oi.device) for shape in (
            (columns + 1, columns + 1), (rows, columns + 1), ()
        )]  # fmt: skip
        return cls(*zeros)

    @classmethod
    def interleaved(cls, shares: Sequence[Moments], device: torch.device) -> Moments:
        """Of all folds, from those of folds 0, N, 2 N, ..., of folds 1, N + 1, ..., up to those of fold N - 1.

        shares: in this order, on any device. device: where the result is.
        """
        if len(shares) == 1:
            return shares[0]
        folds = sum(len(share.energy) for share in shares)
        places = [(shares[fold % len(shares)], fold // len(shares)) for fold in range(folds)]
        return cls(*(
            torch.stack([getattr(share, name)[place].to(device) for share, place in places])
            for name in ("inputs", "missing", "energy")
        ))  # fmt: skip

    def add(self, fold: int, x_ti: Tensor, missing_to: Tensor, weight_t: Tensor | None) -> None:
        """Add tokens: quantized inputs (tokens, in), what is missing (tokens, out), weights (tokens,) or None for 1.

        Args:
            fold: the part of the images that the tokens belong to, from 0.
            x_ti: quantized inputs, (tokens, in).
            missing_to: what is missing in the output, (tokens, out).
            weight_t: how much each token counts, (tokens,); None: all alike.
        """
        x = torch.cat([x_ti, torch.ones_like(x_ti[:, :1])], 1)
        root = torch.ones_like(x[:, :1]) if weight_t is None else weight_t.sqrt()[:, None]
        x, missing = x * root, missing_to * root
        self.inputs[fold] += x.T @ x
        self.missing[fold] += missing.T @ x
        self.energy[fold] += missing.square().sum()

    def solve(self, ridge: float, without: int | None = None) -> Tensor:
        """D (out, in + 1) for this ridge, from all folds or all but one. The bias has a ridge of its own, 0.001."""
        inputs, missing = self.inputs.sum(0), self.missing.sum(0)
        if without is not None:
            inputs, missing = inputs - self.inputs[without], missing - self.missing[without]
        diagonal = inputs.diagonal()
        penalty = torch.full_like(diagonal, ridge * float(diagonal[:-1].mean().clamp_min(1e-30)))
        penalty[-1] = 1e-3 * diagonal[-1].clamp_min(1e-30)
        factor = torch.linalg.cholesky(inputs + torch.diag(penalty))
        return torch.cholesky_solve(missing.T, factor).T

    def error(self, change_oi: Tensor, fold: int) -> float:
        """sum a |E - D x^|^2 over one fold for D (out, in + 1)."""
        cross = (change_oi * self.missing[fold]).sum()
        return float(self.energy[fold] - 2 * cross + ((change_oi @ self.inputs[fold]) * change_oi).sum())

    def mean_missing(self, change_oi: Tensor) -> Tensor:
        """The bias (out,) that is best after the weight has changed by (out, in)."""
        inputs = self.inputs.sum(0)[-1]
        return (self.missing.sum(0)[:, -1] - change_oi @ inputs[:-1]) / inputs[-1]


def token_weights(x_ti: Tensor) -> Tensor:
    """min(1, median / |x|^2) for each token (tokens,): a massive token counts no more than a usual one."""
    power = x_ti.square().sum(1)
    return (power.median() / power.clamp_min(1e-30)).clamp_max(1.0)


def _input_name(graph_module: GraphModule, name: str) -> str:
    reader = next(node for node in graph_module.graph.nodes if node.name == name)
    return str(reader.all_input_nodes[0].name)
