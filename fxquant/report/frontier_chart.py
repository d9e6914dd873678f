"""The frontier of an artefact: least predicted loss over budgets, what a further 0.1 bit saves, where the model stands.

From the cost table that the file holds, along the convex hull, which needs no solver (`allocators.frontier`).
"""

from __future__ import annotations

from typing import Any

from allocators.allocation import Allocation
from allocators.frontier import MEAN_BITS, FrontierPoint, default_limits, frontier
from allocators.problem.cost_table import CostTable
from fxquant.errors import FxQuantError
from fxquant.report.charts import line_chart
from fxquant.report.sections import Cell, Table

_AXES = {
    MEAN_BITS: ("mean bits of weights and of activations", 1.0, "bits"),
    "mean_weight_bits": ("mean weight bits", 1.0, "bits"),
    "mean_activation_bits": ("mean activation bits", 1.0, "bits"),
    "weight_bytes": ("bytes of quantized weights, MB", 1e6, "MB"),
    "bit_operations": ("bit operations, G", 1e9, "G"),
    "latency_ms": ("predicted latency, ms", 1.0, "ms"),
}
_ROWS = 12


def frontier_of(table: CostTable | None, allocation: Allocation | None) -> dict[str, Any] | None:
    """Chart, table and a sentence; None where there is no table, or nothing to choose in it."""
    if table is None or allocation is None:
        return None
    axis = _axis(allocation)
    name, scale, unit = _AXES[axis]
    limits = allocation.budget.limits
    asked = limits.get("mean_weight_bits" if axis == MEAN_BITS else axis, allocation.usage.get(axis, 0.0))
    try:
        points = frontier(table, axis, [*default_limits(table, axis), asked])
    except FxQuantError:  # pinned so far that there is no second budget
        return None
    shown = [(point.limit / scale, point.loss) for point in points if point.loss > 0]
    here = allocation.usage["mean_weight_bits" if axis == MEAN_BITS else axis] / scale
    if len({loss for _, loss in shown}) < 2 or shown[0][0] == shown[-1][0] or allocation.objective <= 0:
        return None
    step = f"{points[0].step / scale:.3g} {unit}"
    near = min(points, key=lambda point: abs(point.limit - asked))
    return {
        "chart": line_chart(
            shown, (here, allocation.objective),
            f"Least predicted loss falls from {shown[0][1]:.3g} to {shown[-1][1]:.3g} over {name}; "
            f"this model has {allocation.objective:.3g} at {here:.3g}.", name, "least predicted loss",
        ),
        "table": _table(points, scale, unit, step, near),
        "says": _says(near, step, allocation.objective),
    }  # fmt: skip


def _axis(allocation: Allocation) -> str:
    """The axis along which the budget can be moved: what it limits, bit operations where that is several quantities."""
    limits = allocation.budget.limits
    means = {name: limit for name, limit in limits.items() if name.startswith("mean")}
    if len(limits) == len(means) == 2 and len(set(means.values())) == 1:
        return MEAN_BITS
    return next(iter(limits)) if len(limits) == 1 else "bit_operations"


def _says(near: FrontierPoint, step: str, loss: float) -> str:
    parts = []
    if near.gain is not None:
        parts.append(f"a further {step} saves a predicted loss of {near.gain:.2g} ({near.gain / loss:.0%} of all)")
    if near.price is not None:
        parts.append(f"giving {step} back costs {near.price:.2g} ({near.price / loss:.0%})")
    return f"At this budget, {', and '.join(parts)}." if parts else "There is one budget only."


def _table(points: list[FrontierPoint], scale: float, unit: str, step: str, near: FrontierPoint) -> Table:
    every = max(1, -(-len(points) // _ROWS))
    kept = [point for index, point in enumerate(points) if index % every == 0 or point in (near, points[-1])]
    rows = tuple(
        (
            Cell(f"{point.limit / scale:.3g}" + (" (here)" if point is near else "")),
            Cell(f"{point.loss:.2e}"),
            Cell("-" if point.gain is None else f"{point.gain:.1e}"),
            Cell("-" if point.price is None else f"{point.price:.1e}"),
        )
        for point in kept
    )
    return Table("Frontier", (f"budget, {unit}", "predicted loss", f"+{step} saves", f"-{step} costs"), rows)
