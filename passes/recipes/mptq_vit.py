"""MPTQ-ViT and what it is compared with: its TSPTQ-ViT baseline and plain min-max."""

from __future__ import annotations

from typing import Any, Unpack

from allocators.milp import Milp
from allocators.uniform import Uniform
from passes.allocate.allocate_bits import AllocateBits
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes.assembly import Options, checked_recipe, norm_inputs, with_options
from passes.search.calibrate import Calibrate
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales, WeightScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers


@checked_recipe
def mptq_vit(budget: Any, *, weight_scales: WeightScales = "tensor", **options: Unpack[Options]) -> Pipeline:
    """MPTQ-ViT: SQ-b, OPT-m after GELU, two-scaled softmax, Hessian-guided scales, mixed bits.

    Tai and Wu, arXiv:2401.14895. The allocator is `Milp()`, ours, unless another is given; `Greedy()` is the paper's.
    `fully_quantized` is its Table 3, LayerNorm's inputs with O-2SF.

    Args:
        budget: anything `Budget.parse` takes.
        weight_scales: "tensor", one scale for each weight as in eq. 2; "channel", one for each output channel, which
            other papers have.
    """
    return with_options(
        options,
        [
            AssignRoles(),
            PlanOperands(post_gelu="opt-m-below-8", **norm_inputs(options, "symmetric", "o-2sf")),
            FoldSqb(),
            InsertObservers(),
            Calibrate(),
            SearchScales(weight_scales=weight_scales),
            AllocateBits(budget, Milp()),
            SubstituteQuantizers(),
        ],
    )


@checked_recipe
def tsptq_vit(budget: Any, *, weight_scales: WeightScales = "tensor", **options: Unpack[Options]) -> Pipeline:
    """TSPTQ-ViT, MPTQ-ViT's baseline: V-2SF after GELU and softmax, O-2SF at LayerNorm; uniform bits by default.

    Tai, Lin and Wu, arXiv:2305.12901, with four groups of channels as in MPTQ-ViT, section 4.

    Args:
        budget: anything `Budget.parse` takes.
        weight_scales: see `mptq_vit`.
    """
    return with_options(
        options,
        [
            AssignRoles(),
            PlanOperands(post_gelu="twin-gelu", **norm_inputs(options, "symmetric", "o-2sf")),
            InsertObservers(),
            Calibrate(),
            SearchScales(weight_scales=weight_scales),
            AllocateBits(budget, Uniform()),
            SubstituteQuantizers(),
        ],
    )


@checked_recipe
def naive_min_max(budget: Any, **options: Unpack[Options]) -> Pipeline:
    """Symmetric uniform quantizers whose range just covers the data; uniform bits: where every comparison starts."""
    return with_options(
        options,
        [
            AssignRoles(),
            PlanOperands(
                post_gelu="symmetric",
                post_relu="symmetric",
                post_softmax="symmetric",
                **norm_inputs(options, "symmetric", "symmetric"),
            ),
            InsertObservers(),
            Calibrate(gradient=False),
            SearchScales(criterion="min-max"),
            AllocateBits(budget, Uniform()),
            SubstituteQuantizers(),
        ],
    )
