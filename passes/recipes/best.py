"""What measurably helps, put together: the recipe to take unless you compare methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

from allocators.milp import Milp
from allocators.problem.budget import Budget
from fxquant.graph.annotation import Role
from passes.allocate.allocate_bits import AllocateBits
from passes.correct.compensate_weights import CompensateWeights
from passes.correct.distil import Distil
from passes.pipeline.contract import Pass
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.prepare.balance_heads import BalanceHeads
from passes.prepare.fold_sqb import FoldSqb
from passes.prepare.rotate_residual import RotateResidual
from passes.recipes.assembly import Options, checked_recipe, norm_inputs, with_options
from passes.search.calibrate import Calibrate
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales, WeightWidths
from passes.search.views import Views
from passes.substitute.substitute_quantizers import SubstituteQuantizers
from passes.substitute.tabulate_gelu import TabulateGelu

NEGLIGIBLE = 3e-5  # in the unit of the objective; such a difference is not worth a second product, or a lookup
NARROWEST = 3  # below, tensors cost more than any prediction says
PROBABILITIES = ("av.left",)  # of which row-log loses as little at 2 bits as others do at 4
BOOK = "codebook<=5"  # wider, uniform scales lose next to nothing
SHRINKAGE = 0.5  # of tokens' weights in Gram matrices: half of what 32 images' gradients say, half all tokens alike
UNCERTAINTY = 0.75  # of weights' losses: bits by losses as 32 images predict them do worse than one width for all
SEARCHED = 128  # images at most, for scales; the rest of a thorough run's images only train


@checked_recipe
def best(
    budget: Any,
    *,
    thorough: bool = False,
    weight_widths: WeightWidths = "channel",
    views: int = Views.each,
    **options: Unpack[Options],
) -> Pipeline:
    """Rotation, balanced heads, SQ-b; codebooks, row-log after softmax; MILP; GPTQ's rounding of columns and rows.

    Up to 5 bits, levels of activations are codebooks; wider ones have uniform scales wherever these cost next to
    nothing, after GELU OPT-m elsewhere. Up to 5 bits, channels of weights have widths of their own, one bit less or
    more than the weight's. GELU itself takes 14-bit codes. Fully quantized, LayerNorm's inputs get O-2SF.

    Args:
        budget: anything `Budget.parse` takes. No tensor has a mean of less than 3 bits where the budget can be met
            without, but fully quantized at a mean of 3 activation bits, which would leave no choice; and attention
            probabilities, which have widths of their own.
        thorough: what GPTQ has rounded is where training starts, of weights with all scales towards the float model's
            outputs; blocks that ridge regression on quantized inputs brings closer on held-out images start from that.
            On these images the result is never further from the float model than without. Give it 1,024 images; what
            it takes and adds: docs/results.md.
        weight_widths: "tensor" gives all channels of a weight one width, for runtimes that take 4 bits as INT4.
        views: how many further images made from each calibration image weights are rounded for too, fewer where there
            are more than 64 images (see `Views`); 0 for images that are no pictures, and to save the time.
        options: see `Options`.
    """
    parsed, fully_quantized = Budget.parse(budget), options.get("fully_quantized", False)
    mean = parsed.mean_activation_bits or parsed.like_uniform_bits or 8
    plan: dict[str, Any] = {"tied": (Role.QK,), **norm_inputs(options, "symmetric", "o-2sf")}
    allocate = AllocateBits(
        parsed,
        Milp(),
        # Inputs of norms and softmax need more than 3 bits: at a mean of 3 something has to pay for them.
        narrowest=2 if fully_quantized and mean <= NARROWEST else NARROWEST,
        spared=PROBABILITIES,
    )
    passes = _rounded(plan, allocate, weight_widths, Views(views))
    return with_options(options, _trained(passes) if thorough else passes)


def _rounded(plan: dict[str, Any], allocate: AllocateBits, weight_widths: WeightWidths, views: Views) -> list[Pass]:
    """The passes of `best`.

    Args:
        plan: what is planned for operands beside what `best` always has.
        allocate: what gives bits.
        weight_widths, views: see `best`.
    """
    return [
        AssignRoles(),
        PlanOperands(
            post_gelu=f"asymmetric|opt-m|{BOOK}",
            post_relu=f"asymmetric|{BOOK}",
            post_softmax="row-log",
            other=f"symmetric|{BOOK}",
            **plan,
        ),
        RotateResidual(),
        BalanceHeads(),
        FoldSqb(),
        InsertObservers(),
        Calibrate(shrinkage=SHRINKAGE, outputs=True, views=views),
        SearchScales(
            keep_grams=True,
            negligible=NEGLIGIBLE,
            weight_widths=weight_widths,
            dampening=CompensateWeights.dampening,
            shrinkage=UNCERTAINTY,
        ),
        allocate,
        CompensateWeights(),
        SubstituteQuantizers(),
        TabulateGelu(),
    ]


def _trained(passes: list[Pass]) -> list[Pass]:
    """The passes of `best_thorough`: those of `best`, whose rounding is where training starts."""
    return [_thorough(step) for step in passes]


def _thorough(step: Pass) -> Pass:
    if isinstance(step, Calibrate):
        return replace(step, images=SEARCHED)
    return Distil(rounding=step) if isinstance(step, CompensateWeights) else step


@checked_recipe
def best_thorough(
    budget: Any, *, weight_widths: WeightWidths = "channel", views: int = Views.each, **options: Unpack[Options]
) -> Pipeline:
    """`best` with `thorough=True`, by a name that the one call and the command line take.

    Args:
        budget, weight_widths, views, options: see `best`.
    """
    return best(budget, thorough=True, weight_widths=weight_widths, views=views, **options)
