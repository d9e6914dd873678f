"""What recipes share: their options, and how these change a list of passes.

    return with_options(options, [AssignRoles(), PlanOperands(), FoldSqb(), InsertObservers(), Calibrate(), ...])

So a recipe is a list of passes to read from top to bottom, as it is without options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fxquant.checks.hints import checked
from fxquant.errors import BY_ARGUMENT, BudgetError, PipelineError
from passes.allocate.allocate_bits import AllocateBits, normalized_overrides
from passes.allocate.check_budget import CheckBudget
from passes.allocate.measure_latency import MeasureLatency
from passes.lower.lower import SIMULATED, resolved
from passes.options import RecipeOptions
from passes.pipeline.contract import Pass
from passes.pipeline.pipeline import Pipeline
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes.restrict_families import restrict_families
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales

Options = RecipeOptions
"""What every recipe takes."""

checked_recipe = checked(PipelineError, **BY_ARGUMENT)
"""Decorator of a recipe: unknown options, and those of the wrong type or value, raise before anything is built."""


def norm_inputs(options: Options, softmax: str, layer_norm: str) -> dict[str, Any]:
    """For PlanOperands: families of the inputs of softmax and LayerNorm, where these compute on quantized ones.

    Args:
        options: of the recipe, whose `fully_quantized` decides.
        softmax: the recipe's family of softmax inputs.
        layer_norm: its family of LayerNorm inputs.
    """
    return {"softmax_input": softmax, "layer_norm_input": layer_norm} if options.get("fully_quantized") else {}


def with_options(options: Options, passes: Sequence[Pass]) -> Pipeline:
    """The pipeline of a recipe's passes, as its options change them, with its budget checked right after the plan.

    `fully_quantized` is the recipe's own affair.

    Args:
        options: see `Options`; those that are not there change nothing.
        passes: of the recipe, with PlanOperands, InsertObservers, SearchScales and AllocateBits among them.

    Raises BudgetError for a budget of latency without kernels that can be timed, BackendError for a backend that cannot
    run the recipe's quantizers.
    """
    changed: list[Pass] = []
    bits = options.get("bits", SearchScales.bits)
    for step in passes:
        if isinstance(step, FoldSqb) and "fold" in options:
            continue
        if isinstance(step, PlanOperands):
            changed += [restrict_families(step, options.get("backend", SIMULATED)), CheckBudget()]
        elif isinstance(step, InsertObservers):
            fold = options.get("fold")
            changed += [step] if fold is None else [fold, step]
        elif isinstance(step, SearchScales):
            changed.append(replace(step, bits=bits))
        elif isinstance(step, AllocateBits):
            changed += [] if step.budget.latency_ms is None else [_timed(options)]
            changed.append(_allocation(step, bits, options))
        else:
            changed.append(step)
    return Pipeline(changed)


def _allocation(step: AllocateBits, bits: tuple[int, ...], options: Options) -> AllocateBits:
    """The recipe's allocation with what the caller wants otherwise."""
    return replace(
        step,
        allocator=options.get("allocator") or step.allocator,
        overrides=normalized_overrides(options.get("overrides")),
        first_last_bits=options.get("first_last_bits"),
        # Images come in 8 bits; where the candidates end below, the widest is what they get.
        image_bits=max(bits, default=8),
    )


def _timed(options: Options) -> MeasureLatency:
    """The measurement that a budget of latency needs.

    Raises BudgetError unless the backend is the one whose kernels are timed, BackendError where they are absent.
    """
    backend = options.get("backend", SIMULATED)
    if backend not in ("auto", "cpu-native") or resolved(backend) != "cpu-native":
        raise BudgetError(
            f"a budget in ms needs backend='cpu-native', whose kernels are timed on this machine; found {backend!r}"
        )
    return options.get("latency") or MeasureLatency()
