"""The frontier of a cost table: the least predicted loss at every budget, and what a further step of budget is worth.

Along one quantity the frontier's lower convex hull is exact and immediate: with a price lambda per unit every layer
minimises cost_l + lambda usage_l by itself (Everett, 1963), so the hull of the sum is made of the layers' own hulls,
their segments sorted by steepness. Its vertices are optimal at their own usage; between two of them the integer program
finds what the hull leaves. `hull` gives the vertices, `frontier` the points at given budgets.

Deliberately not done: frontiers over two independent quantities; "mean_bits" moves both means together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from allocators.allocation import Allocation
from allocators.allocator import Allocator
from allocators.problem.arrays import FloatArray
from allocators.problem.budget import QUANTITIES, TOLERANCE, Budget
from allocators.problem.cost_table import Assignment, CostTable
from fxquant.errors import BudgetError

MEAN_BITS: Final = "mean_bits"
"""Mean weight bits and mean activation bits, limited alike."""

AXES: Final = (MEAN_BITS, *QUANTITIES)
"""What a frontier can run along; a latency only where the table has one."""

_STEP_BITS: Final = 0.1


@dataclass(frozen=True)
class FrontierPoint:
    """The best allocation within one budget.

    Args:
        limit: the budget, in units of the axis.
        allocation: bits, predicted loss, usage, and by which solver: "hull" where no integer program was solved.
        step: one step of budget, in units of the axis: what 0.1 bit is.
        gain: predicted loss that a further step saves, along the chord to the next point; None at the last.
        price: predicted loss that giving a step back costs, along the chord to the previous point; None at the first.
    """

    limit: float
    allocation: Allocation
    step: float
    gain: float | None = None
    price: float | None = None

    @property
    def loss(self) -> float:
        """Predicted loss."""
        return self.allocation.objective


class Hull(NamedTuple):
    """Vertices of the lower convex hull, by ascending usage: float64 [V] each, and V assignments made on demand.

    Args:
        usage: in units of the axis.
        loss: predicted loss.
        assignment: the columns, int64 [2, L], of a vertex.
    """

    usage: FloatArray
    loss: FloatArray
    assignment: Callable[[int], Assignment]


def hull(table: CostTable, quantity: str, budget: Budget | None = None) -> Hull:
    """The hull along one quantity; operands that do not use it have their cheapest width, the narrowest of equal ones.

    Args:
        table: the problem.
        quantity: one of QUANTITIES, what is limited.
        budget: says how means are averaged.

    Raises:
        BudgetError: the quantity is not one of QUANTITIES.
    """
    row = _index(quantity)
    start = np.empty((2, len(table.layers)), dtype=np.int64)
    segments: list[tuple[float, int, float, float, np.ndarray]] = []
    usage = loss = 0.0
    for layer in range(len(table.layers)):
        choices = table.choices(layer, budget)
        vertices = _layer_hull(choices.usage[row], choices.cost)
        start[:, layer] = choices.columns[:, vertices[0]]
        usage, loss = usage + choices.usage[row, vertices[0]], loss + choices.cost[vertices[0]]
        for here, there in itertools.pairwise(vertices):
            more = choices.usage[row, there] - choices.usage[row, here]
            less = choices.cost[here] - choices.cost[there]
            segments.append((less / more, layer, more, less, choices.columns[:, there]))
    # A layer's own segments are convex, so sorting by steepness keeps their order.
    segments.sort(key=lambda segment: -segment[0])
    usages = usage + np.cumsum([0.0, *(segment[2] for segment in segments)])
    losses = loss - np.cumsum([0.0, *(segment[3] for segment in segments)])

    def assignment(vertex: int) -> Assignment:
        found = start.copy()
        for _, layer, _, _, columns in segments[:vertex]:
            found[:, layer] = columns
        return found

    return Hull(usages, np.maximum(losses, 0.0), assignment)


def frontier(
    table: CostTable,
    axis: str = MEAN_BITS,
    limits: Sequence[float] | None = None,
    allocator: Allocator | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[FrontierPoint]:
    """The Pareto points along an axis, by ascending limit; a limit that buys nothing over the one before is left out.

    Args:
        table: the problem.
        axis: "mean_bits" or one of QUANTITIES.
        limits: budgets in units of the axis; by default a quarter bit apart, from the least usage to the most.
        allocator: finds the best allocation within a budget, such as `Milp()`; None takes the hull's last vertex
            within it, which is optimal at its own usage and no worse than a hull segment above the best.
        advance: called after every budget.

    Raises:
        BudgetError: the axis is not known, or a limit is not positive.
        InfeasibleBudgetError: a limit is below the least usage.
    """
    if axis not in AXES:
        raise BudgetError(f"a frontier runs along one of {', '.join(AXES)}; found {axis!r}")
    wanted = default_limits(table, axis) if limits is None else sorted(set(map(float, limits)))
    hulls = [hull(table, quantity) for quantity in quantities_of(axis)] if allocator is None else []
    found: list[tuple[float, Allocation]] = []
    for limit in wanted:
        budget = budget_at(axis, limit)
        table.check_feasible(budget)
        allocation = allocator.allocate(table, budget) if allocator else _on_hull(table, budget, hulls)
        if not found or allocation.objective < found[-1][1].objective * (1 - 1e-12):
            found.append((limit, allocation))
        advance()
    return _priced(found, step_of(table, axis))


def default_limits(table: CostTable, axis: str) -> list[float]:
    """Budgets a quarter bit apart (for operations and latency as many between the extremes), the extremes included.

    Raises BudgetError for a latency that the table does not have.
    """
    widths = [side.bits_at(columns) for side in table.sides for columns in map(side.columns, range(len(table.layers)))]
    span = max(int(bits.max()) for bits in widths) - min(int(bits[bits > 0].min()) for bits in widths if bits.any())
    limited = quantities_of(axis)
    table.meter(budget_at(axis, 1.0))  # refuses a latency where no times are known
    least, most = table.minimum_usage(), table.usage(table.highest())
    low, high = max(least[q] for q in limited), max(most[q] for q in limited)
    return [float(limit) for limit in np.unique(np.linspace(low, high, 4 * span + 1))]


def budget_at(axis: str, limit: float) -> Budget:
    """The budget of one point. Raises BudgetError for an unknown axis or a limit that is not positive."""
    if axis not in AXES:
        raise BudgetError(f"a frontier runs along one of {', '.join(AXES)}; found {axis!r}")
    if not (math.isfinite(limit) and limit > 0):
        raise BudgetError(f"a limit must be finite and positive, found {limit}")
    return Budget.from_dict(dict.fromkeys(quantities_of(axis), limit))


def quantities_of(axis: str) -> tuple[str, ...]:
    """What an axis limits."""
    return ("mean_weight_bits", "mean_activation_bits") if axis == MEAN_BITS else (axis,)


def step_of(table: CostTable, axis: str) -> float:
    """What 0.1 bit is along an axis: of every weight in bytes; for bit operations, as large a share of their range."""
    if axis == "weight_bytes":
        return float(table.elements[table.is_weight].sum()) * _STEP_BITS / 8
    if axis in ("bit_operations", "latency_ms"):
        least, most = table.minimum_usage()[axis], table.usage(table.highest())[axis]
        return _STEP_BITS * (most - least) / max(float(table.bits[-1] - table.bits[0]), 1.0)
    return _STEP_BITS


def _index(quantity: str) -> int:
    if quantity not in QUANTITIES:
        raise BudgetError(f"a hull runs along one of {', '.join(QUANTITIES)}; found {quantity!r}")
    return QUANTITIES.index(quantity)


def _layer_hull(usage: FloatArray, cost: FloatArray) -> list[int]:
    """Indices of the vertices of the lower left convex hull of P points, by ascending usage and falling cost."""
    order = np.lexsort((np.arange(len(usage)), cost, usage))
    vertices: list[int] = []
    for index in order:
        if vertices and (usage[index] <= usage[vertices[-1]] or cost[index] >= cost[vertices[-1]]):
            continue
        while len(vertices) > 1 and _slope(usage, cost, vertices[-2], vertices[-1]) <= _slope(
            usage, cost, vertices[-1], index
        ):
            vertices.pop()
        vertices.append(int(index))
    return vertices


def _slope(usage: FloatArray, cost: FloatArray, first: int, second: int) -> float:
    """How much loss one unit of usage saves between two points."""
    return float((cost[first] - cost[second]) / (usage[second] - usage[first]))


def _on_hull(table: CostTable, budget: Budget, hulls: list[Hull]) -> Allocation:
    """The last vertices within the budget; weights from the first hull and activations from the second, of two."""
    chosen = []
    for found, limit in zip(hulls, budget.limits.values(), strict=True):
        within = np.flatnonzero(found.usage <= limit * (1 + TOLERANCE))
        chosen.append(found.assignment(int(within[-1])))
    assignment = chosen[0] if len(chosen) == 1 else np.where(table.is_weight, *chosen)
    return Allocation.of(table, assignment, budget, status="heuristic", gap=None, solver="hull", seconds=0.0)


def _priced(found: list[tuple[float, Allocation]], step: float) -> list[FrontierPoint]:
    slopes = [
        (here.objective - there.objective) / (more - less) for (less, here), (more, there) in itertools.pairwise(found)
    ]
    return [
        FrontierPoint(
            limit,
            allocation,
            step,
            gain=slopes[index] * step if index < len(slopes) else None,
            price=slopes[index - 1] * step if index else None,
        )
        for index, (limit, allocation) in enumerate(found)
    ]
