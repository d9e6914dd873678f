"""Mix-QViT: bits by relevance times sensitivity, as small and as cheap as the uniform model.

    mix_qvit("MP4")                                  both limits of the paper's "*" rows: model size and bit operations
    mix_qvit("MP4", optimise="closed-form")          weights then corrected without gradient steps
    mix_qvit("MP4", sensitivity="none")              relevance only, as in LRP-QViT; importance="none": sensitivity only
    mix_qvit("MP4", base=mptq_vit, fold=FoldSqb())   on MPTQ-ViT's quantizers and fold, which kernels run

Every layer is scored and allocated, patch embedding, head and attention matmuls too; no layer type is pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack

from allocators.milp import Milp
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.relevance_sensitivity import RelevanceSensitivity
from passes.allocate.score_layers import ScoreLayers
from passes.correct.correct_weights import CorrectWeights
from passes.correct.reconstruct import Reconstruct
from passes.pipeline.contract import Pass
from passes.pipeline.pipeline import Pipeline
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes.adalog import adalog, repq_vit
from passes.recipes.assembly import Options, checked_recipe

Optimise = Literal["none", "closed-form", "reconstruct"]
CLIPPED = FoldSqb(strength=1.0, mu="midrange", percentile=99.9)
"""Every channel of a post-LayerNorm activation with a range of its own, cut at a percentile, and one scale for all."""


@checked_recipe
def mix_qvit(
    budget: Any,
    *,
    base: Callable[..., Pipeline] = adalog,
    importance: Literal["relevance", "none"] = "relevance",
    sensitivity: Literal["measured", "none"] = "measured",
    operands: Literal["separate", "together"] = "separate",
    baseline_bits: int | None = None,
    optimise: Optimise = "none",
    **options: Unpack[Options],
) -> Pipeline:
    """Mix-QViT: its allocation and its clipped channel-wise quantization, on the quantizers of another recipe.

    Ranjan and Savakis, arXiv:2501.06357. `fold` is `CLIPPED` unless another is given, whatever the base.

    Args:
        budget: "MP4" for what the paper's "*" rows allow, or anything else `Budget.parse` takes.
        base: the recipe whose quantizers are used; the paper's are AdaLog's.
        importance, sensitivity, operands, baseline_bits: see `RelevanceSensitivity`; bits of a layer's weights and
            inputs are tied where operands are measured together.
        optimise: a key of `OPTIMISATIONS`.

    Raises PipelineError for another, BudgetError for a budget that cannot be read.
    """
    own: Options = {
        "allocator": options.get("allocator") or Milp(tie_weights_and_activations=operands == "together"),
        "fold": options.get("fold", CLIPPED),
    }
    metric = RelevanceSensitivity(importance, sensitivity, operands, baseline_bits)
    pipeline = base(budget, **(options | own)).before(AllocateBits, ScoreLayers(metric, roles=None))
    return pipeline.after(AllocateBits, *OPTIMISATIONS[optimise])


@checked_recipe
def lrp_qvit(budget: Any, *, base: Callable[..., Pipeline] = repq_vit, **options: Unpack[Options]) -> Pipeline:
    """LRP-QViT: bits by relevance alone, clipped channel-wise quantization, RepQ-ViT's quantizers.

    Ranjan and Savakis, arXiv:2401.11243.

    Args:
        budget: anything `Budget.parse` takes.
        base: the recipe whose quantizers are used.
    """
    return mix_qvit(budget, base=base, sensitivity="none", **options)


OPTIMISATIONS: dict[str, tuple[Pass, ...]] = {
    "none": (),
    "closed-form": (CorrectWeights(),),
    "reconstruct": (Reconstruct(),),
}
"""What follows the allocation, by the name `optimise` takes."""
