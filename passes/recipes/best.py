"""What measurably helps, put together: the recipe to take unless you compare methods."""

from __future__ import annotations

from typing import Any, Unpack

from allocators.milp import Milp
from passes.allocate_bits import AllocateBits
from passes.check_budget import CheckBudget
from passes.compensate_weights import CompensateWeights
from passes.correct_weights import CorrectWeights
from passes.fold_sqb import FoldSqb
from passes.insert_observers import InsertObservers
from passes.pipeline import Pipeline
from passes.recipes.assembly import CANDIDATE_BITS, Options, assemble
from passes.rotate_residual import RotateResidual
from passes.search_scales import SearchScales


def best(budget: Any, *, thorough: bool = False, **options: Unpack[Options]) -> Pipeline:
    """Rotation and SQ-b before; OPT-m after GELU, log2 or twin scales after softmax; MILP; GPTQ's rounding.

    budget: anything `Budget.parse` takes. thorough: weights are corrected by ridge regression on quantized inputs
    before they are rounded; give it 128 images, it takes some times as long. What each part adds: docs/results.md.
    Under the fully quantized protocol LayerNorm's inputs get O-2SF.
    """
    norms: dict[str, Any] = {"softmax_input": "symmetric", "layer_norm_input": "o-2sf"}
    insert = InsertObservers(post_softmax="log2|twin-softmax", **(norms if options.get("fully_quantized") else {}))
    pipeline = assemble(budget, insert, options, allocator=Milp(), fold=FoldSqb())
    pipeline = pipeline.after(CheckBudget, RotateResidual())
    if thorough:
        return pipeline.after(AllocateBits, CorrectWeights())
    search = SearchScales(options.get("bits", CANDIDATE_BITS), keep_grams=True)
    return pipeline.replace(SearchScales, search).after(AllocateBits, CompensateWeights())


def best_thorough(budget: Any, **options: Unpack[Options]) -> Pipeline:
    """`best` with `thorough=True`, by a name that the one call and the command line take."""
    return best(budget, thorough=True, **options)
