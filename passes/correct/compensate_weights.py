"""CompensateWeights: round weights one after another, so that later ones make up for the errors of earlier ones.

With G = R R^T the layer's damped Gram matrix, R upper triangular, the cost of an error d = w - q is |d R|^2, whose term
of column j is R_jj^2 (w_j + sum over k < j of d_k R_kj / R_jj - q_j)^2: column by column, what is in front of q_j is
rounded to the grid (`fxquant.quantizers.statistics.feedback`). This gives what GPTQ gives (Frantar et al., algorithm 1)
without inverting G (Chee et al., QuIP, theorem 6): OPTQ, or GPTQ. Bits stay as allocated.

Rows make up for one another as well, where Calibrate has gathered the Gram matrix H = S S^T of gradients at the layer's
output. Errors D then cost tr(H D G D^T) = |S^T D R|^2 (Tseng et al., YAQA, 2025), the layer's Hessian in its Kronecker
form. With c_ij = d_ij + sum over k < j of d_ik R_kj / R_jj as above, the term of a weight in row i and column j is
S_ii^2 R_jj^2 (c_ij + sum over earlier rows k of c_kj S_ki / S_ii)^2. Rows of one turn are rounded together and
know nothing of one another; what earlier ones leave is added to their weights.

Columns are taken in the order of their inputs' mean squares, the largest first (Frantar et al.'s "act-order"): what a
column leaves is made up for by later ones, and the last, which nothing follows, are those that matter least.

The scale of a row was searched without feedback. With it another may cost less, since later columns make up for what is
clipped; so every row is rounded with a few scales around the searched one, and keeps what costs least.

The result is written back as the layer's float weight, whose entries now lie on their grid, and the candidate of the
allocated width gets the scales, so that substitution finds exactly these codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from fxquant.graph.annotation import annotate_operands, annotation_of, nodes_with_role
from fxquant.graph.facts import Fact
from fxquant.quantizers.observers import Observer
from fxquant.quantizers.statistics.feedback import WELL_DAMPED, column_order, factor
from fxquant.quantizers.statistics.low_rank import LowRank
from fxquant.quantizers.uniform import UniformQuantizer
from passes.pipeline.contract import Effect, PassContext
from passes.search.calibrate import GRAMS_KNOWN
from passes.search.insert_observers import observers_of
from passes.search.owners import owners_of_nodes
from passes.substitute.substitute_quantizers import BITS_ALLOCATED, chosen

TURNS = 8  # in which the rows of a group are rounded; more make up for more of one another, and take longer
LARGE = 1 << 19  # weights from which on rounding has half as many turns, at the scale that is likely the best one
SCALES = (0.85, 0.925, 1.0, 1.075)  # relative to the searched one; rows take each of them about as often


@dataclass(frozen=True)
class CompensateWeights:
    """Compensate rounding errors column by column in every linear and convolution layer that has a Gram matrix.

    Args:
        dampening: added to G's diagonal, relative to its mean. GPTQ's own 0.01 is for hundreds of thousands of tokens;
            32 images have some thousands, and fewer that count where gradients weigh them (`Calibrate(shrinkage=...)`).
        block: columns between two updates of the rest.
        scales: what every row's scale is tried at, relative to the searched one; (1.0,) keeps that.

    Needs `SearchScales(keep_grams=True)`.
    """

    dampening: float = WELL_DAMPED
    block: int = 128
    scales: tuple[float, ...] = SCALES

    requires: ClassVar[frozenset[Fact]] = frozenset({BITS_ALLOCATED, GRAMS_KNOWN})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset({GRAMS_KNOWN})
    effect: ClassVar[Effect] = Effect.WEIGHTS

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if self.dampening < 0 or self.block < 1 or not self.scales or min(self.scales) <= 0:
            raise CalibrationError(
                f"dampening must be at least 0, block at least 1 column, and scales above 0; found {self}"
            )

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Rewrite weights in place and let go of Gram matrices; returns how many layers.

        Notes the summed cost d G d^T before and after, to some per cent: of a low rank of G.
        """
        work = []
        for node in nodes_with_role(graph_module):
            annotation = annotation_of(node)
            candidate = chosen(annotation.weight, annotation.layer) if annotation.weight else None
            observers = [observer for _, observer in observers_of(graph_module, node) if observer.has_gram]
            if candidate is None or not observers:
                continue
            module, quantizer = graph_module.get_submodule(str(node.target)), candidate.quantizer
            if not isinstance(module, nn.Linear | nn.Conv2d) or not isinstance(quantizer, UniformQuantizer):
                raise CalibrationError(
                    f"{node.name}: only uniform weights of linear layers and convolutions can be compensated: "
                    "leave CompensateWeights out"
                )
            work.append((node, module, observers[0], quantizer))

        def rounded(layer: tuple[Node, nn.Linear | nn.Conv2d, Observer, UniformQuantizer]) -> dict[str, Tensor]:
            _, module, observer, quantizer = layer
            rows, (gram, outputs) = module.weight.detach().flatten(1), observer.released_grams()
            given = (rows, gram, quantizer, outputs)
            key = context.cache.key_of(*given, repr(self))
            return context.cache.recall_tensors(key, partial(self._rounded, *given))

        costs = [_cost(module) for _, module, _, _ in work]
        owners = owners_of_nodes(graph_module, [node for node, *_ in work])
        found = context.deal("compensating weights", rounded, work, costs, owners)
        for (node, module, observer, quantizer), kept in zip(work, found, strict=True):
            steps, scale = (kept[name].to(module.weight.device) for name in ("steps", "scale"))
            weight = (steps.float() * scale).to(module.weight.dtype).reshape(module.weight.shape)
            module.weight = nn.Parameter(weight, requires_grad=False)
            _take_quantizer(node, quantizer.rescaled(scale))
            observer.release()
        before, after = (sum(float(kept["costs"][place]) for kept in found) for place in range(2))
        context.note(cost_before=before, cost_after=after)
        return len(work)

    def _rounded(
        self, rows: Tensor, gram: Tensor, quantizer: UniformQuantizer, outputs: Tensor | None
    ) -> dict[str, Tensor]:
        """The weight in steps of its scale, (out, in), that scale, and the costs of rounding to nearest and of this.

        Steps are whole, and a byte or two each: all layers' are held before the first weight is replaced.
        """
        seen = LowRank.of(gram.float())
        rounded, scaled = compensate_scaled(rows, gram, quantizer, self.scales, self.dampening, self.block, outputs)
        errors = ((after - rows).float() for after in (quantizer(rows), rounded))
        costs = [seen.cost(error).sum(dtype=torch.float64) for error in errors]
        steps = (rounded / scaled.scale).round().to(torch.int8 if scaled.zero_point is None else torch.int16)
        return {"steps": steps, "scale": scaled.scale, "costs": torch.stack(costs)}


def _take_quantizer(node: Node, quantizer: UniformQuantizer) -> None:
    """Give the weight's candidate of the allocated width this quantizer; its predicted loss stays as searched."""
    annotate_operands(
        node,
        candidates=[
            tuple(replace(c, quantizer=quantizer) if c.bits == operand.bits else c for c in operand.candidates)
            if operand.argument is None
            else operand.candidates
            for operand in annotation_of(node).operands
        ],
    )


def compensate_scaled(
    weight_oi: Tensor,
    gram_ii: Tensor,
    quantizer: UniformQuantizer,
    scales: Sequence[float] = SCALES,
    dampening: float = WELL_DAMPED,
    block: int = 128,
    outputs_goo: Tensor | None = None,
) -> tuple[Tensor, UniformQuantizer]:
    """`compensate` at the scale of every row that costs least, where rows may make up for one another too.

    Args:
        weight_oi: the weight to round, float (out, in).
        gram_ii: the Gram matrix of the layer's inputs, float (in, in), positive semi-definite.
        quantizer: its scale is (out, 1), or () where rows share one, which then stays.
        scales: what is tried, relative to the quantizer's scale.
        dampening: the share of the mean diagonal that is added to the diagonal; see CompensateWeights.
        block: columns of which the earlier ones' errors are gathered in one product.
        outputs_goo: the Gram matrix of the gradients at the layer's output, float (groups, outputs, outputs), of groups
            of neighbouring rows; None: no row makes up for another.

    Returns:
        The weight on its grid, float (out, in), and the quantizer of that grid.
    """
    rows, columns = weight_oi.shape
    scale_o = quantizer.scale.reshape(-1).expand(rows)
    tried = tuple(scales) if quantizer.scale.numel() == rows else (1.0,)
    order = column_order(gram_ii)
    weight_oi = weight_oi[:, order]
    feedback, power = factor(gram_ii[order][:, order], dampening, weight_oi.dtype)
    is_large = weight_oi.numel() >= LARGE
    among, size, turn = outputs_goo, rows, rows
    if outputs_goo is not None:
        among = torch.stack([factor(gram_oo, dampening, weight_oi.dtype)[0] for gram_oo in outputs_goo])
        size = outputs_goo.shape[1]
        turn = -(-size // (TURNS // 2 if is_large else TURNS))
    found, moved, best_o = torch.empty_like(weight_oi), torch.zeros_like(weight_oi), torch.empty_like(scale_o)
    low, high = (end.expand(rows) for end in quantizer.reach)
    for start in range(0, size, turn):
        taken = torch.arange(rows, device=weight_oi.device).reshape(-1, size)[:, start : start + turn].reshape(-1)
        shift = torch.zeros_like(weight_oi[taken])
        if among is not None:
            before = moved.reshape(-1, size, columns)[:, :start]
            shift = (among[:, :start, start : start + turn].mT @ before).reshape(shift.shape)
        # Rows of one turn know nothing of one another, so those of all scales are rounded together.
        steps_so = torch.stack([scale_o[taken] * scale for scale in tried])
        reach = low[taken], high[taken]
        if is_large:
            steps_so = _likely_scale(weight_oi[taken] + shift, power, steps_so, *reach)[None]
        rounded_so, left_so = _round_columns(weight_oi[taken], shift, feedback, steps_so, *reach, block)
        best = torch.einsum("isr,i->sr", left_so.square(), power).argmin(0)
        picked = torch.arange(len(taken), device=taken.device)
        found[taken], best_o[taken] = rounded_so[:, best, picked].T, steps_so[best, picked]
        moved[taken] = left_so[:, best, picked].T - shift
    found = found[:, order.argsort()]
    if tried == (1.0,):
        return found, quantizer
    return found, quantizer.rescaled(best_o[:, None])


def compensate(
    weight_oi: Tensor, gram_ii: Tensor, quantizer: UniformQuantizer, dampening: float = WELL_DAMPED, block: int = 128
) -> Tensor:
    """GPTQ: a weight on the quantizer's grid with small (W^ - W) G (W^ - W)^T.

    Args:
        weight_oi: the weight to round, float (out, in).
        gram_ii: the Gram matrix of the layer's inputs, float (in, in), positive semi-definite.
        quantizer: its scale is (out, 1) or ().
        dampening: the share of the mean diagonal that is added to the diagonal; see CompensateWeights.
        block: columns of which the earlier ones' errors are gathered in one product.

    Returns:
        float (out, in).
    """
    return compensate_scaled(weight_oi, gram_ii, quantizer, (1.0,), dampening, block)[0]


def _likely_scale(target_oi: Tensor, power_i: Tensor, steps_so: Tensor, low_o: Tensor, high_o: Tensor) -> Tensor:
    """Of several scales for each row, (scales, out), the best one, (out,), if no column made up for another."""
    costs = []
    for step in steps_so[:, :, None]:
        rounded = (target_oi / step).round_().clamp_(low_o[:, None], high_o[:, None]).mul_(step)
        costs.append(rounded.sub_(target_oi).square_() @ power_i)
    return steps_so.gather(0, torch.stack(costs).argmin(0, keepdim=True))[0]


def _round_columns(
    weight_oi: Tensor, shift_oi: Tensor, feedback: Tensor, steps_so: Tensor, low_o: Tensor, high_o: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """The weight rounded column by column at several scales, and what is left of what each column was to be.

    Args:
        weight_oi: the weight, (out, in).
        shift_oi: what is added to each weight beside the feedback of earlier columns, (out, in).
        feedback: of earlier columns (in, in), see `fxquant.quantizers.statistics.feedback`.
        steps_so: scales of every row, (scales, out).
        low_o, high_o: the smallest and the largest step of every row, (out,).
        block: columns of which the earlier ones' errors are gathered in one product.

    Returns:
        Both (in, scales, out).
    """
    count = len(steps_so)
    weight = weight_oi.T.repeat(1, count)  # a column's weights stand side by side
    shifted = weight + shift_oi.T.repeat(1, count)
    error, left, result = (torch.empty_like(weight) for _ in range(3))
    scale, low, high = steps_so.reshape(-1), low_o.repeat(count), high_o.repeat(count)
    per_step = 1 / scale
    codes = torch.empty_like(scale)
    for start in range(0, len(weight), block):
        inside = slice(start, start + block)
        target = torch.addmm(shifted[inside], feedback[:start, inside].T, error[:start])
        kept = (weight, result, error, left)
        columns = zip(target, *(each[inside] for each in kept), strict=True)
        for column, (wanted, exact, rounded, missed, remains) in enumerate(columns, start):
            wanted.addmv_(error[start:column].T, feedback[start:column, column])
            # What the quantizer gives, without calling it: nearly all the time of this pass is spent here.
            torch.mul(wanted.float(), per_step, out=codes).round_().clamp_(low, high)
            torch.mul(codes, scale, out=rounded)
            torch.sub(exact, rounded, out=missed)
            torch.sub(wanted, rounded, out=remains)
    shape = (len(weight), count, -1)
    return result.reshape(shape), left.reshape(shape)


def _cost(module: nn.Linear | nn.Conv2d) -> float:
    """How long a layer takes: its columns one after another, each over all rows, and the factor of its G."""
    rows, columns = module.weight.flatten(1).shape
    return float(columns * columns * (rows + columns / 3))
