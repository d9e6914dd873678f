"""What recipes share: their options, and how their passes are put in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from allocators.allocator import Allocator
from allocators.problem.budget import Budget
from allocators.problem.overrides import Bits
from fxquant.checks.hints import checked
from fxquant.errors import BY_ARGUMENT, BudgetError, PipelineError
from passes.allocate.allocate_bits import AllocateBits, normalized_overrides
from passes.allocate.check_budget import with_check
from passes.allocate.measure_latency import MeasureLatency
from passes.lower.lower import SIMULATED, resolved
from passes.pipeline.contract import Pass
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes.restrict_families import restrict_families
from passes.search.calibrate import Calibrate
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import Criterion, SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers

CANDIDATE_BITS = (2, 3, 4, 5, 6, 7, 8)


class Options(TypedDict, total=False):
    """Options of every recipe.

    allocator: any `Allocator`; None for the recipe's own. overrides, first_last_bits: see AllocateBits.
    fully_quantized: softmax and LayerNorm compute on quantized inputs too. fold: FoldSqb with other switches, or None.
    bits: candidate widths. backend: only quantizers and widths that this backend runs as integers, see
    `passes.recipes.restrict_families`. latency: for which batch size and threads a budget's latency holds.
    """

    allocator: Allocator | None
    overrides: Mapping[str, Bits] | None
    first_last_bits: int | None
    fully_quantized: bool
    fold: FoldSqb | None
    bits: tuple[int, ...]
    backend: str
    latency: MeasureLatency | None


checked_recipe = checked(PipelineError, **BY_ARGUMENT)
"""Decorator of a recipe: unknown options, and those of the wrong type or value, raise before anything is built."""


def assemble(
    budget: Any,
    plan: PlanOperands,
    options: Options,
    *,
    allocator: Allocator,
    fold: FoldSqb | None,
    calibrate: Calibrate = Calibrate(),
    criterion: Criterion = "hessian",
    score: Pass | None = None,
) -> Pipeline:
    """The pipeline of a recipe.

    Args:
        budget: anything `Budget.parse` takes.
        plan: what is quantized, before the backend has a say.
        options: what the user asks for.
        allocator, fold: the recipe's own, used where the options name none.
        calibrate: what is gathered from the images.
        criterion: what SearchScales minimises.
        score: a pass between SearchScales and AllocateBits.

    Raises BudgetError for a budget that cannot be read, BackendError for a backend that cannot run the recipe's
    quantizers.
    """
    bits, parsed = options.get("bits", CANDIDATE_BITS), Budget.parse(budget)
    search = SearchScales(bits, criterion)
    plan = restrict_families(plan, options.get("backend", SIMULATED))
    chosen_fold = options.get("fold", fold)
    allocate = AllocateBits(
        parsed,
        options.get("allocator") or allocator,
        normalized_overrides(options.get("overrides")),
        options.get("first_last_bits"),
        # Images come in 8 bits; where the candidates end below, the widest is what they get.
        image_bits=max(bits, default=8),
    )
    passes: list[Pass] = [AssignRoles(), plan]
    passes += [] if chosen_fold is None else [chosen_fold]
    passes += [InsertObservers(), calibrate, search]
    passes += [] if score is None else [score]
    passes += [] if parsed.latency_ms is None else [timed(options)]
    return with_check(Pipeline([*passes, allocate, SubstituteQuantizers()]))


def timed(options: Options) -> MeasureLatency:
    """The measurement that a budget of latency needs.

    Raises BudgetError unless the backend is the one whose kernels are timed, BackendError where they are absent.
    """
    backend = options.get("backend", SIMULATED)
    if backend not in ("auto", "cpu-native") or resolved(backend) != "cpu-native":
        raise BudgetError(
            f"a budget in ms needs backend='cpu-native', whose kernels are timed on this machine; found {backend!r}"
        )
    return options.get("latency") or MeasureLatency()
