"""Choosing scales: activations from streamed moments, weights from a Gram matrix; no value is quantized twice.

The Hessian-guided metric of PTQ4ViT is sum (g (O - O^))^2 over a layer's output O, g = dL/dO. Its published code takes
L = KL(p || p), whose gradient is zero up to round-off; here L is the cross-entropy against labels drawn from the
model's own output, so g g^T is the Fisher matrix and half the metric predicts the rise of the KL divergence.

- An activation error e moves output o by w_o . e. Taking errors of different inputs as uncorrelated, the metric is
  sum h e^2 with h = g^2 W^2 (elementwise squares): a weighted squared error, which the histogram evaluates exactly.
- A weight error d_o of output channel o costs b_o d_o^T G d_o with G = sum over tokens a_t x_t x_t^T, where
  g_to^2 is approximated by a_t b_o (token times channel). All candidates of a layer share G, of
  which they see the directions that count (`fxquant.quantizers.statistics.low_rank`): a candidate costs as much as the
  weight is large, not as much as G is. Where there are many, the candidates of a row are ranked by the `RANKED`
  strongest directions; the loss of the best is of all.
- Channels of a weight may have widths of their own, of a given mean: those are wider whose errors cost more. What 32
  images say of b_o is noisy, so the choice takes half of it from the mean of all channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.graph.annotation import Candidate
from fxquant.quantizers.family import Family, Statistics
from fxquant.quantizers.statistics.feedback import powers_left
from fxquant.quantizers.statistics.low_rank import RANK, LowRank
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.quantizers.uniform_channels import NARROWEST, UniformChannelsQuantizer, mixed_widths

COARSE_RATIOS = (1.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
FINE_STEPS = (-0.075, -0.05, -0.025, 0.025, 0.05)
END_STEPS = (-0.3, -0.2, -0.1, -0.05, -0.025, 0.025, 0.05, 0.1)
HOPELESS = 16.0  # times the least cost of a row: it is not clipped further
CHUNK = 1 << 17  # weights that are searched together, so that all their candidates stay in the processor's cache
RANKED = 32  # directions of G that candidates of layers with more than `RANK` columns are ranked by
LARGEST_STEP, STEP_SIZES = 100, (10, 3, 1)  # a tensor's scales: of so many, how far apart those are that are tried
WIDEST_MIXED = 5  # wider, channels with widths of their own gain next to nothing
SHRINKAGE = 0.5  # of b_o towards its mean, where widths of channels are chosen
WIDEST_ASYMMETRIC = 7  # weight codes are int8; at 8 bits a zero-point brings nothing


def search_activation(
    statistics: Statistics, family: Family, bits: Sequence[int], images: int, weighted: bool
) -> tuple[Candidate, ...]:
    """The best quantizer of one family at each width.

    Args:
        statistics: what calibration learned of the tensor.
        family: the family that proposes quantizers.
        bits: candidate widths in bits, ascending.
        images: how many images the statistics cover; losses are per image.
        weighted: choose by the Hessian-guided metric (the statistics must be weighted), else by plain squared error.
    """
    found = []
    for width in bits:
        proposals = family.propose(statistics, width)
        moments, coherence = statistics.moments, statistics.coherence
        if family.of_rows and statistics.row_moments is not None:
            moments, coherence = statistics.row_moments, 0.0
        plain, sensitive = moments.errors(proposals.levels, proposals.thresholds, coherence)
        # A tensor the loss does not depend on has weights of zero; it still gets the scale that fits it best.
        objective = sensitive if weighted and sensitive.any() else plain
        best = int(objective.argmin())
        loss = 0.5 * float((sensitive if weighted else plain)[best]) / images
        found.append(Candidate(width, proposals.build(best), loss, float(plain[best]), moments.signal))
    return tuple(found)


def search_weight(
    weight_oi: Tensor,
    bits: Sequence[int],
    images: int,
    gram_ii: Tensor | None = None,
    channel_weight_o: Tensor | None = None,
    *,
    dampening: float | None = None,
    search: bool = True,
    asymmetric: bool = False,
    per_tensor: bool = False,
    mixed: bool = False,
) -> tuple[Candidate, ...]:
    """The best scales at each width, and zero-points where they are asked for.

    Candidates are ranges relative to the one that just covers each channel: coarse ratios, then steps around each
    channel's best; asymmetric ranges then move each of their ends, twice. One scale for a whole tensor is searched
    among MPTQ-ViT's 100 (section 4), (k / 100) 1.2 max|W| / 2^(b-1), of which every tenth is tried first.

    Args:
        weight_oi: the weight to search quantizers for, float (out, in).
        bits: the candidate widths in bits, ascending.
        images: how many images G covers; losses are per image.
        gram_ii: G above, float (in, in); None for plain squared error of the weight.
        channel_weight_o: b_o, float (out,); None: one for every channel.
        dampening: of G, where the weight will be rounded with feedback, by `CompensateWeights`: then what later columns
            cannot make up for counts (`fxquant.quantizers.statistics.feedback`). None: it is rounded to nearest.
        search: False takes the scales that cover each channel's range, and tries no others.
        asymmetric: integer zero-points, up to `WIDEST_ASYMMETRIC` bits.
        per_tensor: one scale for the whole tensor, (1, 1); else one for each output channel, (out, 1).
        mixed: give channels widths of their own, whose mean is the candidate's, up to `WIDEST_MIXED` bits; not together
            with `asymmetric` or `per_tensor`.
    """
    weight = weight_oi.detach().float()
    columns, device = weight.shape[1], weight.device
    gram = _seen(gram_ii, dampening, columns, device)
    scaling = torch.ones(len(weight), device=device) if channel_weight_o is None else channel_weight_o
    signal, ranked = _energy(weight), gram if columns <= RANK else gram.strongest(RANKED)
    chunks = torch.split(weight, max(CHUNK // columns, 1))
    found: list[_Searched] = []
    for width in bits:
        has_zero_point = asymmetric and width <= WIDEST_ASYMMETRIC
        if per_tensor:
            ranges = _best_range(weight, ranked, scaling, width, has_zero_point, search)
            of_chunks = [ranges] * len(chunks)
        else:
            of_chunks = [_best_ranges(chunk, ranked, width, has_zero_point, search) for chunk in chunks]
            ranges = torch.cat(of_chunks)
        pairs = [_cost_and_noise(chunk, chosen, width, gram) for chunk, chosen in zip(chunks, of_chunks, strict=True)]
        cost, noise = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        found.append(_Searched(_spanning(ranges, width), cost, noise))
    if mixed:
        found = _mixed(found, scaling)
    return tuple(
        Candidate(
            each.quantizer.bits,
            each.quantizer,
            0.5 * float((each.cost_o * scaling).sum(dtype=torch.float64)) / images,
            float(each.noise_o.sum(dtype=torch.float64)),
            signal,
        )
        for each in found
    )


def _seen(gram_ii: Tensor | None, dampening: float | None, columns: int, device: torch.device) -> LowRank:
    """What the search sees of G."""
    if gram_ii is None:
        return LowRank.identity(columns, device)
    if dampening is None:
        return LowRank.of(gram_ii.float())
    return LowRank.diagonal(powers_left(gram_ii, dampening))


class _Searched(NamedTuple):
    """A weight's quantizer of one width, and of each channel what rounding costs and its squared error, both (out,)."""

    quantizer: UniformQuantizer
    cost_o: Tensor
    noise_o: Tensor


def _mixed(found: Sequence[_Searched], channel_weight_o: Tensor) -> list[_Searched]:
    """The same with channels of one bit less and one more, wherever there are both neighbours."""
    by_width = {each.quantizer.bits: each for each in found}
    cares_o = torch.lerp(channel_weight_o, channel_weight_o.mean(), SHRINKAGE)
    return [
        _mixed_at([by_width[near] for near in (width - 1, width, width + 1)], cares_o)
        if NARROWEST < width <= WIDEST_MIXED and {width - 1, width + 1} <= by_width.keys()
        else each
        for width, each in by_width.items()
    ]


def _mixed_at(near: Sequence[_Searched], cares_o: Tensor) -> _Searched:
    """Every channel as one of three neighbouring widths has it, their mean the middle one."""
    width, costs_wo = near[1].quantizer.bits, torch.stack([each.cost_o for each in near])
    widths_o = mixed_widths(costs_wo * cares_o, width - 1)
    place = (widths_o.long() - (width - 1))[None]

    def picked(of_width: Callable[[_Searched], Tensor]) -> Tensor:
        return torch.stack([of_width(each) for each in near]).gather(0, place)[0]

    scale_o = picked(lambda each: each.quantizer.scale[:, 0])
    quantizer = UniformChannelsQuantizer(width, scale_o[:, None], widths_o[:, None])
    return _Searched(quantizer, picked(lambda each: each.cost_o), picked(lambda each: each.noise_o))


def _best_range(
    weight: Tensor, ranked: LowRank, scaling_o: Tensor, width: int, has_zero_point: bool, search: bool
) -> Tensor:
    """The range of least cost among those that all rows share, (1, ends) as `_covering` gives it."""
    covering = _covering(weight, has_zero_point).amax(0, keepdim=True)
    if not search:
        return covering
    largest = 1.2 if has_zero_point else 1.2 * (1 - 2.0 ** (1 - width))  # of the covering range
    found: dict[int, float] = {}
    best = 0
    for size in STEP_SIZES:
        near = range(1, LARGEST_STEP // size + 1) if not best else range(-3, 4)
        for step in (best + size * place for place in near):
            if 0 < step <= LARGEST_STEP and step not in found:
                cost = _costs(weight, covering * largest * step / LARGEST_STEP, width, ranked)
                found[step] = float((cost * scaling_o).sum(dtype=torch.float64))
        best = min(found, key=found.__getitem__)
    if found[best] == max(found.values()):  # the loss does not depend on this weight
        return covering
    return covering * largest * best / LARGEST_STEP


def _best_ranges(weight: Tensor, ranked: LowRank, width: int, has_zero_point: bool, search: bool) -> Tensor:
    """The range of least cost of every row, as `_covering` gives them."""
    covering = _covering(weight, has_zero_point)
    if not search:
        return covering
    rows, ends = covering.shape
    device = weight.device
    best, least = torch.ones_like(covering), _costs(weight, covering, width, ranked)

    def attempt(ratios: Sequence[Tensor | float], enough: float = math.inf) -> None:
        """Take what is best of these ranges, relative to the covering ones; not the rest once all rows suffer so."""
        nonlocal best, least
        tried, costs = [best], [least]
        for ratio in ratios:
            tried.append(ratio if isinstance(ratio, Tensor) else torch.full_like(best, ratio))
            costs.append(_costs(weight, tried[-1] * covering, width, ranked))
            least = torch.minimum(least, costs[-1])
            if enough < math.inf and bool((costs[-1] > enough * least).all()):
                break
        place = torch.stack(costs).argmin(0)
        best = torch.stack(tried)[place, torch.arange(rows, device=device)]

    # Downwards: what is clipped stays clipped.
    attempt(COARSE_RATIOS, HOPELESS)
    together, each = torch.ones(ends, device=device), torch.eye(ends, device=device) if has_zero_point else ()
    for moved, steps in ((together, FINE_STEPS), *((end, END_STEPS) for end in (*each, *each))):
        attempt([(best + step * moved).clamp_min(END_STEPS[-1] / 4) for step in steps])
    return best * covering


def _covering(weight: Tensor, has_zero_point: bool) -> Tensor:
    """The range of each row that just covers it: (out, 1), the largest magnitude, or (out, 2), how far below and above
    zero it reaches.
    """
    if not has_zero_point:
        return weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return torch.stack([-weight.amin(1), weight.amax(1)], 1).clamp_min(1e-12)


def _spanning(range_or: Tensor, width: int) -> UniformQuantizer:
    """The quantizer of ranges as `_covering` gives them."""
    return UniformQuantizer(width, *_grid(range_or, width))


def _grid(range_or: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point of ranges, each (out, 1); no zero-point for symmetric ones."""
    if range_or.shape[1] == 1:
        return range_or / (2 ** (width - 1) - 1), None
    scale = range_or.sum(1, keepdim=True) / (2**width - 1)
    return scale, torch.round(range_or[:, :1] / scale)


def _costs(weight: Tensor, range_or: Tensor, width: int, gram: LowRank) -> Tensor:
    """What rounding costs each row, (out,), with these ranges. Nearly all the time of the search is spent here."""
    error, scale = _error(weight, range_or, width)
    return gram.cost(error).mul_(scale[:, 0].square())


def _cost_and_noise(weight: Tensor, range_or: Tensor, width: int, gram: LowRank) -> tuple[Tensor, Tensor]:
    """What rounding costs each row, and its plain squared error, each (out,)."""
    error, scale = _error(weight, range_or, width)
    plain = error.square().sum(1)
    return gram.cost(error) * scale[:, 0].square(), plain * scale[:, 0].square()


def _error(weight: Tensor, range_or: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The error of rounding with these ranges, (out, in), in steps of the grid, and these steps, (out, 1).

    Without building a quantizer, and with one matrix beside the weight, so that both stay in the processor's cache.
    """
    scale, zero = _grid(range_or, width)
    per_step = scale.reciprocal()
    codes = (weight * per_step).round_()
    if zero is None:
        codes.clamp_(-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    else:
        codes.clamp_(-zero, 2**width - 1 - zero)
    return codes.addcmul_(weight, per_step, value=-1), scale


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
