"""Mix-QViT: bits by relevance times sensitivity, as small and as cheap as the uniform model.

    mix_qvit("MP4")                                  both limits of the paper's "*" rows: model size and bit operations
    mix_qvit("MP4", optimise="closed-form")          weights then corrected without gradient steps
    mix_qvit("MP4", sensitivity="none")              relevance only, LRP-QViT; importance="none": sensitivity only
    mix_qvit("MP4", fold=CLIPPED)                    its clipped channel-wise quantization, in place of SQ-b

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
from passes.recipes.assembly import Options, checked_recipe
from passes.recipes.mptq_vit import mptq_vit

Optimise = Literal["none", "closed-form", "reconstruct"]
CLIPPED = FoldSqb(strength=1.0, mu="midrange", percentile=99.9)
"""Every channel of a post-LayerNorm activation with a range of its own, cut at a percentile, and one scale for all."""


@checked_recipe
def mix_qvit(
    budget: Any,
    *,
    base: Callable[..., Pipeline] = mptq_vit,
    importance: Literal["relevance", "none"] = "relevance",
    sensitivity: Literal["measured", "none"] = "measured",
    operands: Literal["separate", "together"] = "separate",
    baseline_bits: int | None = None,
    optimise: Optimise = "none",
    **options: Unpack[Options],
) -> Pipeline:
    """Mix-QViT's allocation on the quantizers of another recipe.

    Args:
        budget: "MP4" for what the paper's "*" rows allow, or anything else `Budget.parse` takes.
        base: the recipe whose folds and quantizers are used.
        importance, sensitivity, operands, baseline_bits: see `RelevanceSensitivity`; bits of a layer's weights and
            inputs are tied where operands are measured together.
        optimise: a key of `OPTIMISATIONS`.

    Raises PipelineError for another, BudgetError for a budget that cannot be read.
    """
    own: Options = {"allocator": options.get("allocator") or Milp(tie_weights_and_activations=operands == "together")}
    metric = RelevanceSensitivity(importance, sensitivity, operands, baseline_bits)
    pipeline = base(budget, **(options | own)).before(AllocateBits, ScoreLayers(metric, roles=None))
    return pipeline.after(AllocateBits, *OPTIMISATIONS[optimise])


OPTIMISATIONS: dict[str, tuple[Pass, ...]] = {
    "none": (),
    "closed-form": (CorrectWeights(),),
    "reconstruct": (Reconstruct(),),
}
"""What follows the allocation, by the name `optimise` takes."""
