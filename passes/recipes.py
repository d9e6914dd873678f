"""Recipes: pipelines that put published systems together, each one expression to read, slice and change.

    pipeline = mptq_vit("W4A4")                                # MPTQ-ViT with the integer program
    pipeline = mptq_vit("W4A4", allocator=Greedy())            # exactly as published
    pipeline = pipeline.without(FoldSqb)                       # an ablation

By name: `recipe("mptq_vit")`; all of them: `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from allocators.allocator import Allocator
from allocators.budget import Budget
from allocators.milp import Milp
from allocators.overrides import Bits
from allocators.uniform import Uniform
from fxquant.errors import PipelineError
from passes.allocate_bits import AllocateBits, normalized_overrides
from passes.assign_roles import AssignRoles
from passes.calibrate import Calibrate
from passes.check_budget import CheckBudget
from passes.compensate_weights import CompensateWeights
from passes.fold_sqb import FoldSqb
from passes.insert_observers import InsertObservers
from passes.pipeline import Pipeline
from passes.search_scales import SearchScales
from passes.substitute_quantizers import SubstituteQuantizers

CANDIDATE_BITS = (2, 3, 4, 5, 6, 7, 8)


def mptq_vit(
    budget: Any,
    *,
    allocator: Allocator | None = None,
    overrides: Mapping[str, Bits] | None = None,
    first_last_bits: int | None = None,
    fully_quantized: bool = False,
    fold: FoldSqb | None = FoldSqb(),
    bits: tuple[int, ...] = CANDIDATE_BITS,
) -> Pipeline:
    """MPTQ-ViT: SQ-b, OPT-m after GELU, two-scaled softmax, Hessian-guided scales, mixed bits.

    budget: anything `Budget.parse` takes. allocator: `Milp()` by default, `Greedy()` is the paper's. fully_quantized:
    softmax and LayerNorm compute on quantized inputs too (the paper's Table 3), LayerNorm's with O-2SF. fold: FoldSqb
    with other switches, or None. bits: candidate widths. overrides, first_last_bits: see AllocateBits.
    """
    allocate = _allocate(budget, allocator or Milp(), overrides, first_last_bits, bits)
    return _assemble(fold, InsertObservers(**_norm_inputs(fully_quantized)), Calibrate(), SearchScales(bits), allocate)


def mptq_vit_plus(
    budget: Any,
    *,
    allocator: Allocator | None = None,
    overrides: Mapping[str, Bits] | None = None,
    first_last_bits: int | None = None,
    fully_quantized: bool = False,
    fold: FoldSqb | None = FoldSqb(strength=0.8),
    bits: tuple[int, ...] = CANDIDATE_BITS,
) -> Pipeline:
    """MPTQ-ViT with a stronger fold, and weights rounded with GPTQ's compensation.

    The fold lowers the predicted loss, the compensation the cost of rounding; the accuracy they add is within noise so
    far (docs/results.md). Options: see `mptq_vit`.
    """
    search = SearchScales(bits, keep_statistics=True)
    pipeline = mptq_vit(
        budget,
        allocator=allocator,
        overrides=overrides,
        first_last_bits=first_last_bits,
        fully_quantized=fully_quantized,
        fold=fold,
        bits=bits,
    )
    return pipeline.replace(SearchScales, search).after(AllocateBits, CompensateWeights())


def tsptq_vit(
    budget: Any,
    *,
    allocator: Allocator | None = None,
    overrides: Mapping[str, Bits] | None = None,
    first_last_bits: int | None = None,
    fully_quantized: bool = False,
    fold: FoldSqb | None = None,
    bits: tuple[int, ...] = CANDIDATE_BITS,
) -> Pipeline:
    """TSPTQ-ViT, MPTQ-ViT's baseline: V-2SF after GELU and softmax, O-2SF at LayerNorm; uniform bits by default.

    Options: see `mptq_vit`.
    """
    insert = InsertObservers(post_gelu="twin-gelu", **_norm_inputs(fully_quantized))
    allocate = _allocate(budget, allocator or Uniform(), overrides, first_last_bits, bits)
    return _assemble(fold, insert, Calibrate(), SearchScales(bits), allocate)


def naive_min_max(
    budget: Any,
    *,
    allocator: Allocator | None = None,
    overrides: Mapping[str, Bits] | None = None,
    first_last_bits: int | None = None,
    fully_quantized: bool = False,
    fold: FoldSqb | None = None,
    bits: tuple[int, ...] = CANDIDATE_BITS,
) -> Pipeline:
    """Symmetric uniform quantizers whose range just covers the data; uniform bits: where every comparison starts.

    Options: see `mptq_vit`.
    """
    norms: dict[str, Any] = {"softmax_input": "symmetric", "layer_norm_input": "symmetric"} if fully_quantized else {}
    insert = InsertObservers(post_gelu="symmetric", post_softmax="symmetric", **norms)
    allocate = _allocate(budget, allocator or Uniform(), overrides, first_last_bits, bits)
    return _assemble(fold, insert, Calibrate(gradient=False), SearchScales(bits, metric="min-max"), allocate)


RECIPES: dict[str, Callable[..., Pipeline]] = {
    "mptq_vit_plus": mptq_vit_plus,
    "mptq_vit": mptq_vit,
    "tsptq_vit": tsptq_vit,
    "naive_min_max": naive_min_max,
}


def recipe(name: str) -> Callable[..., Pipeline]:
    """The recipe of this name; raises PipelineError listing the known ones."""
    if name not in RECIPES:
        raise PipelineError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def _allocate(
    budget: Any,
    allocator: Allocator,
    overrides: Mapping[str, Bits] | None,
    first_last_bits: int | None,
    bits: tuple[int, ...],
) -> AllocateBits:
    # Images come in 8 bits; where the candidates end below, the widest is what they get.
    image_bits = max(bits, default=8)
    return AllocateBits(Budget.parse(budget), allocator, normalized_overrides(overrides), first_last_bits, image_bits)


def _assemble(
    fold: FoldSqb | None, insert: InsertObservers, calibrate: Calibrate, search: SearchScales, allocate: AllocateBits
) -> Pipeline:
    folds = () if fold is None else (fold,)
    check = CheckBudget(allocate, insert, search.bits)
    return Pipeline([AssignRoles(), check, *folds, insert, calibrate, search, allocate, SubstituteQuantizers()])


def _norm_inputs(fully_quantized: bool) -> dict[str, Any]:
    return {"softmax_input": "symmetric", "layer_norm_input": "o-2sf"} if fully_quantized else {}
