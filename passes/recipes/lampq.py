"""LampQ and the mixed-precision baseline it is compared with, VT-PTQ: bits for the quantizers of any other recipe.

    lampq("W3A3")                                on AdaLog: type-aware Fisher metric, integer program, iterative update
    lampq("W3A3", base=mptq_vit)                 the same on other quantizers
    lampq("W3A3", type_aware=False, update=None)     without its second and third idea

Both allocate qkv, proj, fc1 and fc2 of every block; everything else gets the budget's mean bits, rounded down (patch
embedding, head, attention matmuls, Swin's reductions, under the fully quantized protocol softmax and LayerNorm inputs).
So the budget holds for the whole model: "W3A3" limits the mean over all weights and that over all inputs, "W3" the
weights only, as the paper does; what the inputs then come to is in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Unpack

from allocators.allocator import Allocator
from allocators.milp import Milp
from allocators.module_frontier import ModuleFrontier
from allocators.problem.budget import Budget
from allocators.problem.overrides import Bits
from fxquant.errors import BudgetError
from fxquant.graph.annotation import WEIGHT_ROLES, Role
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.metrics import FisherTrace, NuclearNorm, TypeAwareFisher
from passes.allocate.score_layers import LAMPQ_ROLES, Metric, ScoreLayers
from passes.allocate.update_bits import UpdateBits
from passes.pipeline.pipeline import Pipeline
from passes.recipes.adalog import adalog
from passes.recipes.assembly import Options, checked_recipe

Base = Callable[..., Pipeline]
"""A recipe: a budget and `Options` to a pipeline with AllocateBits."""


@checked_recipe
def lampq(
    budget: Any,
    *,
    base: Base = adalog,
    layer_wise: bool = True,
    type_aware: bool = True,
    update: UpdateBits | None = UpdateBits(),
    metric: Metric | None = None,
    tied: bool | None = None,
    outside_bits: Bits | None = None,
    **options: Unpack[Options],
) -> Pipeline:
    """LampQ on the quantizers of another recipe.

    Args:
        budget: anything `Budget.parse` takes.
        base: the recipe whose quantizers are used.
        layer_wise: I1; bits by layer, from the integer program; else by module, from the Pareto frontier, and never
            updated.
        type_aware: I2; alpha_t tr(F); else tr(F).
        update: I3; None leaves it out.
        metric: another one than these two.
        tied: weights and inputs of a layer share their bits; None ties them unless the budget gives the two different
            means.
        outside_bits: of all layers outside the four, bits or (weight bits, activation bits).

    Raises BudgetError where it is needed, because the budget has no mean bits.
    """
    parsed = Budget.parse(budget)
    together = _means_agree(parsed) if tied is None else tied
    allocator = (Milp if layer_wise else ModuleFrontier)(tie_weights_and_activations=together)
    chosen = metric or (TypeAwareFisher() if type_aware else FisherTrace())
    pipeline = _mixed(parsed, base, allocator, ScoreLayers(chosen), outside_bits, options)
    if update is None or not layer_wise:
        return pipeline
    return pipeline.after(AllocateBits, replace(update, tied=together))


@checked_recipe
def vt_ptq(
    budget: Any, *, base: Base = adalog, outside_bits: Bits | None = None, **options: Unpack[Options]
) -> Pipeline:
    """VT-PTQ's allocation (Liu et al. 2021): nuclear norms, bits by module, Pareto frontier; weights and inputs tied.

    Args:
        budget, base, outside_bits: see `lampq`. Its quantizers (ranking loss, bias correction) are not here.
    """
    return _mixed(Budget.parse(budget), base, ModuleFrontier(), ScoreLayers(NuclearNorm()), outside_bits, options)


def _mixed(
    budget: Budget, base: Base, allocator: Allocator, score: ScoreLayers, outside_bits: Bits | None, options: Options
) -> Pipeline:
    """The base recipe with scores before its allocation, an allocator, and fixed bits outside the four layers."""
    own: Options = {"allocator": options.get("allocator") or allocator}
    pipeline = base(budget, **(options | own))
    return pipeline.changed(AllocateBits, role_bits=_outside(budget, outside_bits)).before(AllocateBits, score)


def _outside(budget: Budget, bits: Bits | None) -> tuple[tuple[Role, Bits], ...]:
    """Bits of every role outside the four layers; the patch embedding's input is the image, which has its own."""
    if bits is None:
        means = budget.mean_weight_bits, budget.mean_activation_bits
        weight, activation = (int(own or other or 0) for own, other in (means, means[::-1]))
        if not weight:
            raise BudgetError(
                f"the budget {str(budget)!r} has no mean bits, from which layers outside LampQ's four get theirs: "
                f"give outside_bits"
            )
    else:
        weight, activation = bits if isinstance(bits, tuple) else (bits, bits)  # type: ignore[assignment]
    pairs: list[tuple[Role, Bits]] = [(Role.PATCH_EMBED, (weight, None))]
    pairs += [(role, (weight, activation)) for role in sorted(WEIGHT_ROLES - {*LAMPQ_ROLES, Role.PATCH_EMBED})]
    pairs += [(role, (None, activation)) for role in (Role.QK, Role.AV, Role.SOFTMAX, Role.LAYER_NORM)]
    return tuple(pairs)


def _means_agree(budget: Budget) -> bool:
    means = {budget.mean_weight_bits, budget.mean_activation_bits} - {None}
    return len(means) < 2
