"""Recipes: pipelines that put published systems together, each one expression to read, slice and change.

    pipeline = mptq_vit("W4A4")                                # MPTQ-ViT with the integer program
    pipeline = mptq_vit("W4A4", allocator=Greedy())            # exactly as published
    pipeline = pipeline.without(FoldSqb)                       # an ablation

By name: `recipe("mptq_vit")`; all of them: `RECIPES`. Options: `passes.options.RecipeOptions`.
"""

from __future__ import annotations

from collections.abc import Callable

from fxquant.checks.arguments import text
from fxquant.errors import PipelineError
from passes.options import RECIPE_NAMES
from passes.pipeline.pipeline import Pipeline
from passes.recipes.adalog import adalog, repq_vit
from passes.recipes.best import best, best_thorough
from passes.recipes.lampq import lampq, vt_ptq
from passes.recipes.mix_qvit import lrp_qvit, mix_qvit
from passes.recipes.mptq_vit import mptq_vit, naive_min_max, tsptq_vit
from passes.recipes.reconstruction import brecq, fima_q, qdrop
from passes.recipes.rivals import erq, fq_vit, optq, psaq_vit, ptq4vit

__all__ = [
    "RECIPES",
    "adalog",
    "best",
    "best_thorough",
    "brecq",
    "erq",
    "fima_q",
    "fq_vit",
    "lampq",
    "lrp_qvit",
    "mix_qvit",
    "mptq_vit",
    "naive_min_max",
    "optq",
    "psaq_vit",
    "ptq4vit",
    "qdrop",
    "recipe",
    "repq_vit",
    "tsptq_vit",
    "vt_ptq",
]

RECIPES: dict[str, Callable[..., Pipeline]] = {name: globals()[name] for name in RECIPE_NAMES}


def recipe(name: str) -> Callable[..., Pipeline]:
    """The recipe of this name; raises PipelineError listing the known ones."""
    if text("recipe", name, PipelineError) not in RECIPES:
        raise PipelineError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
