"""Cost tables for the tests: random ones, and the answer by trying everything."""

from __future__ import annotations

import itertools

import numpy as np

from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from allocators.problem.latency_table import rising

ROLES = ("qkv", "qk", "softmax", "av", "proj", "fc1", "fc2")


def random_table(
    seed: int,
    count: int = 4,
    weight_bits: tuple[int, ...] = (2, 4, 8),
    activation_bits: tuple[int, ...] = (2, 4, 8),
    decades: float = 3.0,
    masked: bool = True,
) -> CostTable:
    """A table with matmuls, weightless layers, a float input and masks; costs span `decades` and mostly fall.

    Times have plateaus, as digits of activation codes make them.
    """
    generator = np.random.default_rng(seed)
    roles = [ROLES[index % len(ROLES)] for index in range(count)]
    weightless = np.isin(roles, ("qk", "softmax", "av"))
    scale = 10 ** generator.uniform(0, decades, count)
    allowed = [
        generator.random((count, len(bits))) < (0.7 if masked else 2.0) for bits in (weight_bits, activation_bits)
    ]
    for mask in allowed:
        mask[~mask.any(axis=1), -1] = True
    activation_elements = generator.integers(1, 500, count)
    if masked:
        activation_elements[-1] = 0
    noise = generator.uniform(0.5, 2.0, (2, count, max(len(weight_bits), len(activation_bits))))
    return CostTable(
        layers=tuple(f"blocks.{index}.{role}" for index, role in enumerate(roles)),
        roles=tuple(roles),
        weight_elements=np.where(weightless, 0, generator.integers(1, 1000, count)),
        activation_elements=activation_elements,
        macs=np.where(np.isin(roles, "softmax"), 0, generator.integers(1, 10_000, count)),
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_cost=scale[:, None] * 4.0 ** -np.array(weight_bits) * noise[0, :, : len(weight_bits)],
        activation_cost=scale[:, None] * 4.0 ** -np.array(activation_bits) * noise[1, :, : len(activation_bits)],
        weight_sqnr_db=6.02 * np.array(weight_bits) + generator.uniform(-6, 6, (count, len(weight_bits))),
        activation_sqnr_db=6.02 * np.array(activation_bits) + generator.uniform(-6, 6, (count, len(activation_bits))),
        allowed_weight=allowed[0],
        allowed_activation=allowed[1],
        latency_ms=rising(generator.integers(1, 4, (count, len(weight_bits), len(activation_bits))) * 0.25),
    )


def plain_table(**changes: object) -> CostTable:
    """Three layers, W and A in (2, 4, 8), everything allowed, round numbers."""
    bits = np.array([2, 4, 8])
    values = {
        "layers": ("blocks.0.fc1", "blocks.0.qk", "head"),
        "roles": ("fc1", "qk", "head"),
        "weight_elements": [100, 0, 300],
        "activation_elements": [50, 150, 200],
        "macs": [10, 20, 30],
        "weight_bits": (2, 4, 8),
        "activation_bits": (2, 4, 8),
        "weight_cost": np.outer([1.0, 0.0, 2.0], 4.0**-bits),
        "activation_cost": np.outer([1.0, 3.0, 2.0], 4.0**-bits),
        "weight_sqnr_db": np.outer([1.0, 1.0, 1.0], 6.0 * bits),
        "activation_sqnr_db": np.outer([1.0, 1.0, 1.0], 6.0 * bits),
        "allowed_weight": np.ones((3, 3), bool),
        "allowed_activation": np.ones((3, 3), bool),
    }
    return CostTable(**values | changes)


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
        if not budget.exceeded(table.usage(assignment, budget)):
            best = min(best, table.objective(assignment))
    return best
