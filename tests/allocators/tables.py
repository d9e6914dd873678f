"""Cost tables for the tests: random ones, and the answer by trying everything."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from allocators.problem.latency_table import rising

ROLES = ("qkv", "qk", "softmax", "av", "proj", "fc1", "fc2")


def random_table(
    seed: int,
    count: int = 4,
    bits: tuple[int, ...] = (2, 4, 8),
    decades: float = 3.0,
    masked: bool = True,
    tied: float = 0.5,
) -> CostTable:
    """A table with products, tied and not, weightless layers, a float input and masks; costs span `decades` and mostly
    fall.

    Times have plateaus, as digits of activation codes make them. tied: share of products whose inputs have one width.
    """
    generator = np.random.default_rng(seed)
    roles = [ROLES[index % len(ROLES)] for index in range(count)]
    is_absent = np.isin(roles, ("qk", "softmax", "av")) & ~(
        np.isin(roles, ("qk", "av")) & (generator.random(count) >= tied)
    )
    scale = 10 ** generator.uniform(0, decades, count)
    allowed = generator.random((2, count, len(bits))) < (0.7 if masked else 2.0)
    allowed[~allowed.any(axis=2), -1] = True
    elements = np.stack([np.where(is_absent, 0, generator.integers(1, 1000, count)), generator.integers(1, 500, count)])
    if masked:
        elements[1, -1] = 0
    return CostTable(
        layers=tuple(f"blocks.{index}.{role}" for index, role in enumerate(roles)),
        roles=tuple(roles),
        elements=elements,
        macs=np.where(np.isin(roles, "softmax"), 0, generator.integers(1, 10_000, count)),
        bits=bits,
        cost=scale[:, None] * 4.0 ** -np.array(bits) * generator.uniform(0.5, 2.0, (2, count, len(bits))),
        sqnr_db=6.02 * np.array(bits) + generator.uniform(-6, 6, (2, count, len(bits))),
        allowed=allowed,
        latency_ms=rising(generator.integers(1, 4, (count, len(bits), len(bits))) * 0.25),
    )


def plain_table(**changes: object) -> CostTable:
    """Three layers, bits (2, 4, 8), everything allowed, round numbers; the product's inputs are tied.

    changes: fields; "first_" or "second_" before elements, cost, sqnr_db and allowed changes one operand of all layers.
    """
    bits = np.array([2, 4, 8])
    values: dict[str, Any] = {
        "layers": ("blocks.0.fc1", "blocks.0.qk", "head"),
        "roles": ("fc1", "qk", "head"),
        "elements": np.array([[100, 0, 300], [50, 150, 200]]),
        "macs": [10, 20, 30],
        "bits": (2, 4, 8),
        "cost": np.stack([np.outer([1.0, 0.0, 2.0], 4.0**-bits), np.outer([1.0, 3.0, 2.0], 4.0**-bits)]),
        "sqnr_db": np.ones((2, 3, 1)) * 6.0 * bits,
        "allowed": np.ones((2, 3, 3), bool),
    }
    for name, value in changes.items():
        place, _, field = name.partition("_")
        if place in ("first", "second"):
            sides = list(values[field])
            sides[place == "second"] = value
            values[field] = np.array(sides)
        else:
            values[name] = value
    return CostTable(**values)


def untied_table(**changes: object) -> CostTable:
    """`plain_table` whose product's inputs have widths of their own: 60 and 90 elements."""
    cost = np.array(plain_table().cost)
    cost[:, 1] = cost[1, 1] / 2
    return plain_table(**{"first_elements": [100, 60, 300], "second_elements": [50, 90, 200], "cost": cost, **changes})


def budget_between(table: CostTable, fractions: dict[str, float], **means: str) -> Budget:
    """Limits at these fractions of the way from the least usage to the most."""
    basis = Budget(mean_weight_bits=1, mean_activation_bits=1, **means)
    least, most = table.minimum_usage(basis), table.usage(table.highest(), basis)
    limits = {name: least[name] + part * (most[name] - least[name]) for name, part in fractions.items()}
    used = {f"{side}_mean": means[f"{side}_mean"] for side in ("weight", "activation") if f"{side}_mean" in means}
    return Budget(**{name: max(limit, 1e-3) for name, limit in limits.items()}, **used)


def brute_force(table: CostTable, budget: Budget, tied: bool = False) -> float:
    """The least objective within `budget`, by trying every assignment."""
    choices = [table.choices(layer, tied=tied).columns.T for layer in range(len(table.layers))]
    best = np.inf
    for pairs in itertools.product(*choices):
        assignment = np.stack(pairs, axis=1)
        objective = table.objective(assignment)
        if objective < best and not budget.exceeded(table.usage(assignment, budget)):
            best = objective
    return best
