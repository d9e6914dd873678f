"""FoldSqb: move difficulty from post-LayerNorm activations into the weights that read them, exactly (SQ-b).

    Y W^T + b = ((Y - mu) / eps) (eps W)^T + b + mu W^T                                   (MPTQ-ViT, eq. 4-5)

with mu_j = mean(Y_j) and eps_j = (max|Y_j - mu_j| / max|W_:j|)^0.5, both folded: gamma / eps and (beta - mu) / eps into
the LayerNorm, W diag(eps) and b + W mu into every linear layer that reads it. In real numbers nothing changes.

Switches reproduce the paper's Tables 2, 5 and 6: SmoothQuant is mu="none"; Outlier Suppression+ is
eps="outlier-suppression+", mu="midrange". RepQ-ViT's scale reparameterisation, which gives every channel the same
range, is strength=1, mu="midrange" (up to one common factor); Mix-QViT's clipped channel-wise quantization is that with
a percentile below 100. Where zeros are padded between norm and layer (Swin), a shift would have to be padded in too, so
mu is left out there and only eps is folded. Not done: folds through anything but data movement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from fxquant.graph.facts import TRACED, Fact
from fxquant.graph.nodes import module_uses
from fxquant.graph.structure.channel_paths import ChannelPath, channel_paths
from fxquant.quantizers.uniform import UniformQuantizer
from passes.pipeline.contract import Effect, PassContext
from passes.prepare.folds import FOLDED, note_fold

_CHANNEL_TENSORS = ("minimum", "maximum", "mean", "rows", "lowest", "highest")
_CHANNEL_NUMBERS = ("count", "extremes")
EPSILON_RANGE = (1e-4, 1e4)
TOGETHER = 4  # images that are run at once


@dataclass(frozen=True)
class FoldSqb:
    """Fold a per-channel shift mu and scale eps from every LayerNorm into the linear layers that read it.

    Args:
        eps: what gives the scale: "sq-b", the formula above; "outlier-suppression+", max|Y - mu| / t but at least 1,
            with t from a grid search on the quantized layer's output; or "none".
        mu: what gives the shift of a channel: its "mean", the "midrange" of its values, or "none".
        strength: the exponent alpha of eps = reach^alpha / max|W|^(1-alpha). The paper takes 0.5; a larger one moves
            more of the difficulty into the weights.
        percentile: at which percentile of its values a channel's range is cut, at both ends, so that a few outliers do
            not set it; 100 takes all.
        search_bits: the width at which "outlier-suppression+" searches t; otherwise it is not used.

    Applying it twice is harmless but not idempotent: the second time balances what the first has left.
    """

    eps: Literal["sq-b", "outlier-suppression+", "none"] = "sq-b"
    mu: Literal["mean", "midrange", "none"] = "mean"
    strength: float = 0.5
    percentile: float = 100.0
    search_bits: int = 4

    requires: ClassVar[frozenset[Fact]] = frozenset({TRACED})
    provides: ClassVar[frozenset[Fact]] = frozenset({FOLDED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    effect: ClassVar[Effect] = Effect.EXACT

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if not 50 < self.percentile <= 100:
            raise CalibrationError(
                f"a channel's range is cut at a percentile above 50, up to 100; not {self.percentile}"
            )
        if not 0 <= self.strength <= 1 or not 2 <= self.search_bits <= 8:
            raise CalibrationError(f"strength is between 0 and 1, search_bits from 2 to 8, found {self}")

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Fold in place; returns the number of LayerNorms and linear layers changed."""
        paths = channel_paths(graph_module, context.images, context.padded)
        modules = dict(graph_module.named_modules())
        counts = module_uses(graph_module)
        refused, groups = {}, {}
        for norm, path in paths.items():
            reason = path.refusal or _shared(norm, path, counts)
            if reason is None and path.consumers:
                groups[norm] = path
            elif reason is not None:
                refused[norm.name] = reason
        channels = {
            norm: _Channels(self.eps == "outlier-suppression+", 1 - self.percentile / 100, len(context.images))
            for norm in groups
        }
        statistics = _OutputStatistics(graph_module, channels)
        with torch.no_grad():
            settings = "measuring LayerNorm outputs", statistics, graph_module, repr(self)
            # Of every image at a time the grid search keeps some rows.
            for _, batch in context.gather(*settings, together=1 if self.eps == "outlier-suppression+" else TOGETHER):
                statistics.run(batch)
        for norm, path in groups.items():
            linears = [modules[str(node.target)] for node in path.consumers]
            self._fold(modules[str(norm.target)], linears, channels[norm], path.padded)
        note_fold(graph_module, type(self).__name__)
        context.note(folded=[norm.name for norm in groups], refused=refused)
        return len(groups) + sum(len(path.consumers) for path in groups.values())

    def _fold(self, norm: nn.LayerNorm, linears: list[nn.Linear], seen: _Channels, padded: bool) -> None:
        mu = {"mean": seen.mean, "midrange": (seen.minimum + seen.maximum) / 2, "none": torch.zeros_like(seen.mean)}[
            "none" if padded else self.mu
        ]
        reach = torch.maximum((seen.maximum - mu).abs(), (seen.minimum - mu).abs())
        weights = torch.cat([linear.weight.detach().double() for linear in linears])
        eps = self._epsilon(reach, mu, weights, seen)
        dtype = linears[0].weight.dtype
        gamma = torch.ones_like(mu) if norm.weight is None else norm.weight.detach().double()
        beta = torch.zeros_like(mu) if norm.bias is None else norm.bias.detach().double()
        norm.elementwise_affine = True
        norm.weight = nn.Parameter((gamma / eps).to(dtype), requires_grad=False)
        norm.bias = nn.Parameter(((beta - mu) / eps).to(dtype), requires_grad=False)
        for linear in linears:
            weight = linear.weight.detach().double()
            bias = 0.0 if linear.bias is None else linear.bias.detach().double()
            linear.weight = nn.Parameter((weight * eps).to(dtype), requires_grad=False)
            linear.bias = nn.Parameter((bias + weight @ mu).to(dtype), requires_grad=False)

    def _epsilon(self, reach: Tensor, mu: Tensor, weights: Tensor, seen: _Channels) -> Tensor:
        if self.eps == "none":
            return torch.ones_like(reach)
        if self.eps == "sq-b":
            largest = weights.abs().amax(0)
            eps = reach.pow(self.strength) / largest.clamp_min(1e-30).pow(1 - self.strength)
            # A channel that is constant, or that no row reads, has nothing to balance.
            eps = torch.where((reach > 0) & (largest > 0), eps, 1.0)
            return eps.clamp(*EPSILON_RANGE)
        rows = seen.rows - mu
        target = rows @ weights.T
        best, best_error = torch.ones_like(reach), torch.inf
        for t in float(reach.max()) * torch.linspace(0.02, 1.0, 50):
            eps = (reach / t).clamp(1.0, EPSILON_RANGE[1])
            smoothed, scaled = rows / eps, weights * eps
            top = 2 ** (self.search_bits - 1) - 1
            x = UniformQuantizer(self.search_bits, smoothed.abs().max() / top)(smoothed)
            w = UniformQuantizer(self.search_bits, scaled.abs().amax(1, keepdim=True) / top)(scaled)
            error = float((x @ w.T - target).square().sum())
            if error < best_error:
                best, best_error = eps, error
        return best


class _Channels:
    """Streamed per-channel statistics of one LayerNorm's output, float64 (channels,).

    tail: share of the values of a channel cut off at either end; exact, since the extreme ones are kept.
    """

    def __init__(self, keep_rows: bool, tail: float, images: int) -> None:
        self.minimum = self.maximum = self.mean = torch.empty(0)
        self.rows = self.lowest = self.highest = torch.empty(0)
        self.keep_rows, self.tail, self.images, self.count, self.extremes = keep_rows, tail, images, 0, 1

    def update(self, y: Tensor) -> None:
        rows = y.detach().reshape(-1, y.shape[-1]).double()
        self.extremes = 1 + int(self.tail * (len(rows) / len(y) * self.images - 1))
        kept = rows[:: max(1, len(rows) // 128)][:128] if self.keep_rows else self.rows
        self._add(rows, rows, rows.mean(0), kept, len(rows))

    def _add(self, lowest: Tensor, highest: Tensor, mean: Tensor, kept: Tensor, count: int) -> None:
        """Add rows, (n, channels): of `count` of them those that may be extreme, their mean, and those to keep."""
        self.lowest = _smallest(self.lowest, lowest, self.extremes)
        self.highest = -_smallest(-self.highest, -highest, self.extremes)
        self.minimum, self.maximum = self.lowest.amax(0), self.highest.amin(0)
        if not self.count:
            self.mean, self.rows = mean, kept
        else:
            self.mean = self.mean + (mean - self.mean) * (count / (self.count + count))
            self.rows = torch.cat([self.rows, kept]) if self.keep_rows else self.rows
        self.count += count

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what was gathered of further images."""
        if not int(state["count"]):
            return
        self.extremes = int(state["extremes"])
        self._add(state["lowest"], state["highest"], state["mean"], state["rows"], int(state["count"]))

    def state(self) -> dict[str, Tensor]:
        """All that going on from here depends on."""
        found = {name: getattr(self, name) for name in _CHANNEL_TENSORS}
        return found | {name: torch.tensor(getattr(self, name)) for name in _CHANNEL_NUMBERS}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        for name in _CHANNEL_TENSORS:
            setattr(self, name, state[name])
        self.count, self.extremes = (int(state[name]) for name in _CHANNEL_NUMBERS)


def _smallest(kept: Tensor, rows: Tensor, count: int) -> Tensor:
    """The `count` smallest values of every channel among those kept and the new rows."""
    if len(kept):
        rows = torch.cat([kept, rows])
    return rows.topk(min(count, len(rows)), 0, largest=False).values if count > 1 else rows.amin(0, keepdim=True)


class _OutputStatistics(Interpreter):
    def __init__(self, graph_module: GraphModule, channels: dict[Node, _Channels]) -> None:
        super().__init__(graph_module)
        self.channels = channels

    def run_node(self, node: Node) -> Tensor:
        result: Tensor = super().run_node(node)
        if node in self.channels:
            self.channels[node].update(result)
        return result

    def state(self) -> dict[str, Tensor]:
        """All channels' statistics so far, by the name of their node."""
        return {f"{node.name}/{name}": t for node, seen in self.channels.items() for name, t in seen.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        for node, seen in self.channels.items():
            seen.restore({name: state[f"{node.name}/{name}"] for name in seen.state()})

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what was gathered of further images."""
        for node, seen in self.channels.items():
            if f"{node.name}/count" in state:
                seen.merge({name: state[f"{node.name}/{name}"] for name in seen.state()})


def _shared(norm: Node, path: ChannelPath, counts: dict[str, int]) -> str | None:
    for node in (norm, *path.consumers):
        if counts[str(node.target)] > 1:
            return f"{node.target} is used {counts[str(node.target)]} times"
    return None
