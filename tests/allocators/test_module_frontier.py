"""The ModuleFrontier allocator against trying everything, module by module."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators.milp import Milp
from allocators.module_frontier import ModuleFrontier
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from fxquant.errors import BudgetError, InfeasibleBudgetError, OverrideError
from tests.allocators.tables import brute_force, budget_between, random_table

BITS = (2, 3, 4, 6)


def block_table(seed: int, blocks: int = 2) -> CostTable:
    """Blocks of qkv, qk, proj, fc1, fc2, and a head; sizes as in a Vision Transformer, costs over three decades."""
    generator = np.random.default_rng(seed)
    names = [f"blocks.{b}.{name}" for b in range(blocks) for name in ("attn.qkv", "attn.qk", "attn.proj")]
    names += [f"blocks.{b}.{name}" for b in range(blocks) for name in ("mlp.fc1", "mlp.fc2")]
    names.append("head")
    weights = {"qkv": 3, "qk": 0, "proj": 1, "fc1": 4, "fc2": 4, "head": 2}
    inputs = {"qkv": 1, "qk": 2, "proj": 1, "fc1": 1, "fc2": 4, "head": 1}
    roles = [name.rpartition(".")[2] for name in names]
    count, widths = len(names), len(BITS)
    scale = 10 ** generator.uniform(-3, 0, (2, count, 1)) * 4.0 ** -np.array(BITS)
    return CostTable(
        layers=tuple(names),
        roles=tuple(roles),
        elements=[[sizes[role] for role in roles] for sizes in (weights, inputs)],
        macs=[7 + index for index in range(count)],
        bits=BITS,
        cost=scale,
        sqnr_db=np.zeros((2, count, widths)),
        allowed=np.ones((2, count, widths), bool),
    )


def by_modules(table: CostTable, budget: Budget, allocator: ModuleFrontier) -> float:
    """The least objective over one width per module, by trying all."""
    modules = allocator.modules(table)
    best = np.inf
    for widths in itertools.product(range(len(BITS)), repeat=len(modules)):
        assignment = np.full((2, len(table.layers)), -1)
        for layers, column in zip(modules, widths, strict=True):
            for row, side in enumerate(table.sides):
                assignment[row, layers] = np.where(side.elements[layers] > 0, column, -1)
        objective = table.objective(assignment)
        if objective < best and not budget.exceeded(table.usage(assignment, budget)):
            best = objective
    return best


def test_modules_are_halves_of_blocks() -> None:
    table = block_table(0)
    groups = [[table.layers[layer] for layer in layers] for layers in ModuleFrontier().modules(table)]
    assert ["blocks.1.attn.qkv", "blocks.1.attn.proj"] in groups
    assert ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"] in groups
    assert ["blocks.0.attn.qk"] in groups
    assert ["head"] in groups
    assert len(groups) == 7
    assert len(ModuleFrontier(module_wise=False).modules(table)) == len(table.layers)


@pytest.mark.parametrize("limits", [{"mean_weight_bits": 3.4}, {"mean_weight_bits": 3.4, "mean_activation_bits": 3.2}])
@pytest.mark.parametrize("seed", range(2))
def test_finds_the_best_module_wise_allocation(limits: dict[str, float], seed: int) -> None:
    table, budget = block_table(seed), Budget(**limits)
    allocation = ModuleFrontier().allocate(table, budget)
    assert allocation.objective == pytest.approx(by_modules(table, budget, ModuleFrontier()), rel=1e-12)
    assert allocation.status == "optimal"
    assert not budget.exceeded(allocation.usage)
    for block in range(2):
        msa = {allocation.weight_bits[f"blocks.{block}.attn.{name}"] for name in ("qkv", "proj")}
        msa |= {allocation.activation_bits[f"blocks.{block}.attn.{name}"] for name in ("qkv", "proj")}
        assert len(msa) == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_layer_wise_it_is_the_optimum(seed: int, weight: float, activation: float, tied: bool) -> None:
    """Any masks, sizes and limits; against brute force over all layers."""
    table = random_table(seed, count=3, masked=not tied)
    budget = budget_between(table, {"mean_weight_bits": weight, "mean_activation_bits": activation})
    found = ModuleFrontier(module_wise=False, tie_weights_and_activations=tied).allocate(table, budget)
    assert found.objective == pytest.approx(brute_force(table, budget, tied=tied), rel=1e-9)
    assert not budget.exceeded(found.usage)


@pytest.mark.parametrize("quantities", [("weight_bytes",), ("bit_operations",), ("mean_weight_bits", "bit_operations")])
def test_every_quantity_can_be_budgeted(quantities: tuple[str, ...]) -> None:
    table = random_table(3, count=4)
    budget = budget_between(table, dict.fromkeys(quantities, 0.4))
    found = ModuleFrontier(module_wise=False, tie_weights_and_activations=False).allocate(table, budget)
    assert found.objective == pytest.approx(brute_force(table, budget), rel=1e-9)


def test_milp_is_never_worse_and_layers_gain_over_modules() -> None:
    table, budget = block_table(5, blocks=6), Budget.parse("W3A3")
    modules, layers = (ModuleFrontier(module_wise=module_wise).allocate(table, budget) for module_wise in (True, False))
    milp = Milp(tie_weights_and_activations=True).allocate(table, budget)
    assert layers.objective < modules.objective
    assert milp.objective == pytest.approx(layers.objective, rel=1e-3)


def test_a_thinned_frontier_says_so_and_keeps_the_budget() -> None:
    table, budget = block_table(5, blocks=4), Budget.parse("W3A3")
    exact, thinned = (ModuleFrontier(states=states).allocate(table, budget) for states in (20_000, 9))
    assert (exact.status, thinned.status, thinned.gap) == ("optimal", "heuristic", None)
    assert thinned.objective >= exact.objective
    assert not budget.exceeded(thinned.usage)


def test_overrides() -> None:
    table = block_table(1).override({"blocks.0.attn.proj": 6})
    found = ModuleFrontier().allocate(table, Budget.parse("W3A3"))
    assert found.weight_bits["blocks.0.attn.proj"] == 6
    half: dict[str, Any] = {"allowed": np.array(table.allowed)}
    half["allowed"][0, 0], half["allowed"][0, 2] = [True, True, False, False], [False, False, True, True]
    half["allowed"][1] = True
    values = {**table.to_dict(), **half}
    with pytest.raises(OverrideError, match="no width is allowed for all"):
        ModuleFrontier().allocate(CostTable(**values), Budget.parse("W6A6"))


def test_a_budget_that_layers_meet_and_modules_do_not_is_refused() -> None:
    """Both layers of a half follow one that is pinned; the lowest widths of the layers alone are no promise."""
    table, budget = block_table(0).override({"blocks.0.mlp.fc1": (6, None)}), Budget.parse("W2.8")
    table.check_feasible(budget)
    with pytest.raises(InfeasibleBudgetError, match=r"mean_weight_bits 2.8 is below .* 3.23\d*; .*module_wise=False"):
        ModuleFrontier(tie_weights_and_activations=False).allocate(table, budget)


def test_refusals() -> None:
    with pytest.raises(InfeasibleBudgetError):
        ModuleFrontier().allocate(block_table(0), Budget.parse("W1.5"))
    with pytest.raises(BudgetError, match="states=0"):
        ModuleFrontier(states=0)
