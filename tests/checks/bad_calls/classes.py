"""Every class of options: passes, metrics, allocators, contexts."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from allocators.greedy import Greedy
from allocators.milp import Milp
from allocators.module_frontier import ModuleFrontier
from allocators.problem.budget import Budget
from allocators.quadratic import Interaction, Quadratic
from allocators.swaps import Swaps
from fxquant.data.preprocessing import Preprocessing
from fxquant.synthesis.pictures import Synthesis
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.measure_latency import MeasureLatency
from passes.allocate.metrics import FisherTrace, NuclearNorm, TypeAwareFisher
from passes.allocate.relevance_sensitivity import RelevanceSensitivity
from passes.allocate.score_layers import ScoreLayers
from passes.allocate.update_bits import UpdateBits
from passes.correct.compensate_weights import CompensateWeights
from passes.correct.correct_weights import CorrectWeights
from passes.correct.distil import Distil
from passes.correct.reconstruct import Reconstruct
from passes.lower.lower import Lower
from passes.pipeline.contract import PassContext
from passes.prepare.balance_heads import BalanceHeads
from passes.prepare.fold_sqb import FoldSqb
from passes.search.augment import Augment
from passes.search.calibrate import Calibrate
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales
from tests.checks.bad_calls.generator import Entry, Make, is_budget, unfit


def classes() -> list[Entry]:
    """Every class of options: passes, metrics, allocators, contexts."""
    required: dict[type, dict[str, Make]] = {
        AllocateBits: {"budget": lambda: "W4A4"},
        Budget: {"mean_weight_bits": lambda: 4},
        ScoreLayers: {"metric": NuclearNorm},
        Interaction: {"first": lambda: ("a", "weight"), "second": lambda: ("b", "weight"), "correlation": lambda: 0.5},
        Quadratic: {"interactions": tuple},
        Preprocessing: {"input_size": lambda: (3, 16, 16)},
    }
    known_classes: tuple[Any, ...] = (
        AllocateBits, Augment, BalanceHeads, Budget, Calibrate, CompensateWeights, CorrectWeights, Distil, FisherTrace,
        FoldSqb, Greedy, Interaction, Lower, MeasureLatency, Milp, ModuleFrontier, PassContext, PlanOperands,
        Preprocessing, Quadratic, Reconstruct, RelevanceSensitivity, ScoreLayers, SearchScales, Swaps, Synthesis,
        TypeAwareFisher, UpdateBits,
    )  # fmt: skip
    found = []
    for each in known_classes:
        hints = get_type_hints(each)
        bad = {option.name: unfit(hints[option.name]) for option in fields(each) if option.init}
        if each in (AllocateBits,):
            bad["budget"] = [value for value in bad["budget"] if not is_budget(value)]
        known = {name: values for name, values in bad.items() if values}
        found.append(Entry(each.__name__, each, required.get(each, {}), known))
    return found
