"""What measurably helps, put together: the recipe to take unless you compare methods."""

from __future__ import annotations

from typing import Any, Unpack

from allocators.milp import Milp
from passes.allocate_bits import AllocateBits
from passes.check_budget import CheckBudget
from passes.compensate_weights import CompensateWeights
from passes.fold_sqb import FoldSqb
from passes.insert_observers import InsertObservers
from passes.pipeline import Pipeline
from passes.recipes.assembly import CANDIDATE_BITS, Options, assemble
from passes.rotate_residual import RotateResidual
from passes.search_scales import SearchScales


def best(budget: Any, **options: Unpack[Options]) -> Pipeline:
    """Rotation and SQ-b before; OPT-m after GELU, log2 or twin scales after softmax; MILP; GPTQ's rounding.

    budget: anything `Budget.parse` takes. What each part adds: docs/results.md. Under the fully quantized protocol
    LayerNorm's inputs get O-2SF.
    """
    norms: dict[str, Any] = {"softmax_input": "symmetric", "layer_norm_input": "o-2sf"}
    insert = InsertObservers(post_softmax="log2|twin-softmax", **(norms if options.get("fully_quantized") else {}))
    search = SearchScales(options.get("bits", CANDIDATE_BITS), keep_statistics=True)
    pipeline = assemble(budget, insert, options, allocator=Milp(), fold=FoldSqb())
    pipeline = pipeline.after(CheckBudget, RotateResidual())
    return pipeline.replace(SearchScales, search).after(AllocateBits, CompensateWeights())
