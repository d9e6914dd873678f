"""Other systems in the papers' tables, without gradient steps: PTQ4ViT, FQ-ViT, PSAQ-ViT, OPTQ and ERQ.

What each differs in from its paper: docs/reference/papers.md.
"""

from __future__ import annotations

from typing import Any, Unpack

from allocators.uniform import Uniform
from fxquant.graph.annotation import Role
from passes.allocate.allocate_bits import AllocateBits
from passes.correct.correct_weights import CorrectWeights
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.recipes.adalog import repq_vit
from passes.recipes.assembly import Options, checked_recipe, norm_inputs, with_options
from passes.search.calibrate import Calibrate
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers


@checked_recipe
def ptq4vit(budget: Any, **options: Unpack[Options]) -> Pipeline:
    """PTQ4ViT: twin uniform quantizers after softmax and GELU, Hessian-guided scales, one for a weight; uniform bits.

    Yuan et al., ECCV 2022. The metric has the gradient that the paper means (docs/explanation/methods.md), values
    belong to one of the twin ranges, and the steps of these are not powers of two apart, as in the published code.
    """
    return with_options(
        options,
        [
            AssignRoles(),
            PlanOperands(
                post_gelu="twin-uniform-gelu",
                post_softmax="twin-uniform-softmax",
                **norm_inputs(options, "symmetric", "symmetric"),
            ),
            InsertObservers(),
            Calibrate(),
            SearchScales(weight_scales="tensor"),
            AllocateBits(budget, Uniform()),
            SubstituteQuantizers(),
        ],
    )


@checked_recipe
def fq_vit(budget: Any, **options: Unpack[Options]) -> Pipeline:
    """FQ-ViT: fully quantized, ranges by the extremes; powers of two for LayerNorm's channels, log2 after softmax.

    Lin et al., IJCAI 2022: symmetric weights by channel, asymmetric activations, PTF with K = 3. Always fully
    quantized. Softmax computes in float on its quantized input, where the paper has an integer exponential.
    """
    return with_options(
        options,
        [
            AssignRoles(),
            PlanOperands(
                post_gelu="asymmetric",
                post_softmax="log-int-softmax",
                other="asymmetric",
                softmax_input="asymmetric",
                layer_norm_input="ptf",
            ),
            InsertObservers(),
            Calibrate(gradient=False),
            SearchScales(criterion="min-max"),
            AllocateBits(budget, Uniform()),
            SubstituteQuantizers(),
        ],
    )


@checked_recipe
def psaq_vit(budget: Any, **options: Unpack[Options]) -> Pipeline:
    """PSAQ-ViT: ranges by the extremes of images made from the model; attention scores quantized, probabilities float.

    Li et al., ECCV 2022: symmetric weights by channel, asymmetric activations. Call it without calibration images,
    which are then made (`fxquant.synthesis`); with images it is the paper's quantizer on these.
    """
    inputs = {"softmax_input": "asymmetric", **norm_inputs(options, "asymmetric", "asymmetric")}
    return with_options(
        options,
        [
            AssignRoles(),
            PlanOperands(
                post_gelu="asymmetric",
                post_softmax=None,
                other="asymmetric",
                image="asymmetric",
                tied=(Role.QK,),  # the probabilities are a row of their own, which no width is counted for
                **inputs,
            ),
            InsertObservers(),
            Calibrate(gradient=False),
            SearchScales(criterion="min-max"),
            AllocateBits(budget, Uniform()),
            SubstituteQuantizers(),
        ],
    )


@checked_recipe
def optq(budget: Any, **options: Unpack[Options]) -> Pipeline:
    """OPTQ (GPTQ) on RepQ-ViT's quantizers: weights rounded column by column, on quantized inputs.

    Frantar et al., ICLR 2023, algorithm 1, with its dampening of 0.01; the tables of LampQ and ERQ have it on a ViT.
    """
    rounded = CorrectWeights(ridges=(), rounding="gptq", dampening=0.01, robust=False)
    return repq_vit(budget, **options).after(AllocateBits, rounded)


@checked_recipe
def erq(budget: Any, **options: Unpack[Options]) -> Pipeline:
    """ERQ on RepQ-ViT's quantizers: ridge regression makes up for quantized inputs, then weights are rounded.

    Zhong et al., ICML 2024, eq. 5-7. The ridge of each layer is chosen by cross-validation, where the paper has a
    constant, and GPTQ rounds in the place of its rounding refinement, which has the same aim.
    """
    return repq_vit(budget, **options).after(AllocateBits, CorrectWeights(robust=False))
