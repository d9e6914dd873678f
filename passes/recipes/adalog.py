"""AdaLog and RepQ-ViT: the quantizers LampQ builds on, uniform bits by default."""

from __future__ import annotations

from typing import Any, Unpack

from allocators.uniform import Uniform
from passes.allocate.allocate_bits import AllocateBits
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes.assembly import Options, checked_recipe, norm_inputs, with_options
from passes.search.calibrate import Calibrate
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers

REPARAMETERISE = FoldSqb(strength=1.0, mu="midrange")
"""RepQ-ViT's scale reparameterisation: every channel after LayerNorm gets the same range."""


@checked_recipe
def adalog(budget: Any, **options: Unpack[Options]) -> Pipeline:
    """AdaLog: adaptive logarithm bases after softmax and GELU, asymmetric uniform elsewhere, RepQ-ViT's fold.

    Scales and bases minimise the error of the layer's output, each output weighed by how much the loss cares for it;
    the published code weighs all alike, which is `.replace(Calibrate, Calibrate(gradient=False, output_error=True))`
    and is less accurate here. Both logarithmic tables have a zero, as in that code; without one, as the formula
    has them, they are `.changed(PlanOperands, post_gelu="adalog-gelu", post_softmax="adalog-softmax")`.
    """
    return with_options(
        options,
        [
            AssignRoles(),
            PlanOperands(
                post_gelu="adalog-zero-gelu",
                post_softmax="adalog-zero-softmax",
                other="asymmetric",
                weight="asymmetric",
                **norm_inputs(options, "asymmetric", "asymmetric"),
            ),
            REPARAMETERISE,
            InsertObservers(),
            Calibrate(),
            SearchScales(),
            AllocateBits(budget, Uniform()),
            SubstituteQuantizers(),
        ],
    )


@checked_recipe
def repq_vit(budget: Any, **options: Unpack[Options]) -> Pipeline:
    """RepQ-ViT: its fold, log-sqrt2 after softmax, asymmetric uniform elsewhere, scales of least squared error."""
    return with_options(
        options,
        [
            AssignRoles(),
            PlanOperands(
                post_gelu="asymmetric",
                post_softmax="log-sqrt2",
                other="asymmetric",
                weight="asymmetric",
                **norm_inputs(options, "asymmetric", "asymmetric"),
            ),
            REPARAMETERISE,
            InsertObservers(),
            Calibrate(gradient=False),
            SearchScales(criterion="mse"),
            AllocateBits(budget, Uniform()),
            SubstituteQuantizers(),
        ],
    )
