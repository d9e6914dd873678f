"""Every class of options: passes, metrics, allocators, contexts."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from allocators.budget import Budget
from allocators.greedy import Greedy
from allocators.milp import Milp
from allocators.pareto import Pareto
from allocators.quadratic import Interaction, Quadratic
from allocators.swaps import Swaps
from fxquant.data import Preprocessing
from fxquant.synthesis.synthesize import Synthesis
from passes.allocate_bits import AllocateBits
from passes.augment import Augment
from passes.balance_heads import BalanceHeads
from passes.calibrate import Calibrate
from passes.compensate_weights import CompensateWeights
from passes.contract import PassContext
from passes.correct_weights import CorrectWeights
from passes.distil import Distil
from passes.fold_sqb import FoldSqb
from passes.insert_observers import InsertObservers
from passes.lower import Lower
from passes.measure_latency import MeasureLatency
from passes.metrics import FisherTrace, NuclearNorm, TypeAwareFisher
from passes.reconstruct import Reconstruct
from passes.relevance_sensitivity import RelevanceSensitivity
from passes.score_layers import ScoreLayers
from passes.search_scales import SearchScales
from passes.update_bits import UpdateBits
from tests.bad_calls.generator import Entry, Make, is_budget, unfit


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
        FoldSqb, Greedy, InsertObservers, Interaction, Lower, MeasureLatency, Milp, Pareto, PassContext, Preprocessing,
        Quadratic, Reconstruct, RelevanceSensitivity, ScoreLayers, SearchScales, Swaps, Synthesis, TypeAwareFisher,
        UpdateBits,
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
