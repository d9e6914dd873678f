"""The frontier of a model: least predicted loss over budgets, what a further 0.1 bit is worth, and what really happens.

    found = fxquant.frontier(model, images, limits=[3, 4, 5, 6], realised="divergence")
    print(found)                                   # a table; found.plot("frontier.png"), found.to_dict()

Calibrates and searches once. `exact` solves the integer program at every budget; without it, points are vertices of
the convex hull, at once and optimal at their own usage (`allocators.frontier`). Predicted losses are estimates that
add up over tensors; the realised loss of a point is measured on the model compiled so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from allocators.allocation import Allocation
from allocators.frontier import MEAN_BITS, FrontierPoint, budget_at, default_limits
from allocators.frontier import frontier as frontier_of
from allocators.milp import Milp
from allocators.problem.budget import Budget
from allocators.problem.cost_table import CostTable
from fxquant import ranks
from fxquant.checks.arguments import number
from fxquant.checks.hints import checked
from fxquant.checks.torch_modes import exact
from fxquant.errors import BY_ARGUMENT, BudgetError, CalibrationError, OptionError
from fxquant.graph.nodes import device_of
from fxquant.report.plots import plot_frontier
from fxquant.report.progress import shown
from fxquant.report.render import Document
from fxquant.report.sections import Cell, Lines, Table
from fxquant.sensitivity.objective import Objective, Outputs
from fxquant.session.compiled import Compiled
from fxquant.session.options import DEFAULT_BATCH_SIZE, SessionOptions
from fxquant.session.session import Session
from fxquant.synthesis.pictures import Synthesis
from passes.options import documented
from passes.pipeline.contract import check_images
from passes.pipeline.progress import ProgressReporter

_UNITS = {"weight_bytes": (1e6, "MB"), "bit_operations": (1e9, "GBOPs"), "latency_ms": (1.0, "ms")}


@dataclass(frozen=True)
class Frontier(Document):
    """Points by ascending budget.

    Args:
        axis: the quantity that budgets limit, such as mean_bits.
        points: the best allocation within each budget.
        realised: measured losses, one a point; empty if not asked.
        realised_name: what was measured of the compiled models, such as divergence.
        unit: the unit of the losses.
    """

    axis: str
    points: tuple[FrontierPoint, ...]
    realised: tuple[float, ...] = ()
    realised_name: str = ""
    unit: str = ""

    def sections(self) -> list[Lines | Table]:
        """A table, and how to read it."""
        scale, unit = _UNITS.get(self.axis, (1.0, "bits"))
        measured = [self.realised_name] if self.realised else []
        step = f"{self.points[0].step / scale:.3g} {unit}"
        columns = (f"limit, {unit}", "W bits", "A bits", "MB", "GBOPs", "predicted loss", *measured,
                   f"+{step} saves", f"-{step} costs", "found by")  # fmt: skip
        rows = []
        for index, point in enumerate(self.points):
            usage = point.allocation.usage
            rows.append(
                (
                    f"{point.limit / scale:.3f}",
                    f"{usage['mean_weight_bits']:.3f}",
                    f"{usage['mean_activation_bits']:.3f}",
                    f"{usage['weight_bytes'] / 1e6:.3f}",
                    f"{usage['bit_operations'] / 1e9:.3f}",
                    f"{point.loss:.4g}",
                    *([f"{self.realised[index]:.4g}"] if self.realised else []),
                    "-" if point.gain is None else f"{point.gain:.3g}",
                    "-" if point.price is None else f"{point.price:.3g}",
                    f"{point.allocation.solver}, {point.allocation.status}",
                )
            )
        cells = tuple(tuple(map(Cell, row)) for row in rows)
        last = frozenset({len(columns) - 1})
        title = f"Frontier over {self.axis.replace('_', ' ')}{f'; losses: {self.unit}' if self.unit else ''}"
        return [Table(title, columns, cells, last)]

    def to_dict(self) -> dict[str, Any]:
        """JSON values with full precision."""
        points = [
            {
                "limit": point.limit,
                "budget": str(point.allocation.budget),
                "predicted_loss": point.loss,
                "gain": point.gain,
                "price": point.price,
                "usage": point.allocation.usage,
                "status": point.allocation.status,
                "solver": point.allocation.solver,
                "weight_bits": point.allocation.weight_bits,
                "activation_bits": point.allocation.activation_bits,
                **({"realised": self.realised[index]} if self.realised else {}),
            }
            for index, point in enumerate(self.points)
        ]
        step = self.points[0].step
        return {
            "axis": self.axis,
            "step": step,
            "unit": self.unit,
            "realised": self.realised_name or None,
            "points": points,
        }

    def plot(self, path: str | PathLike[str]) -> None:
        """Loss over the budget as .png, .svg or .pdf. Raises MissingExtraError without matplotlib, ArtefactError."""
        scale, unit = _UNITS.get(self.axis, (1.0, "bits"))
        limits = [point.limit / scale for point in self.points]
        lines = {"predicted loss": [point.loss for point in self.points]}
        if self.realised:
            lines[self.realised_name] = list(self.realised)
        plot_frontier(path, f"{self.axis.replace('_', ' ')}, {unit}", limits, lines)


@checked(OptionError, **BY_ARGUMENT, axis=BudgetError, limits=BudgetError, realised=BudgetError)
@documented(SessionOptions)
def frontier(
    model: nn.Module,
    calibration: Tensor | Iterable[Any] | Synthesis | None = None,
    *,
    axis: str = MEAN_BITS,
    limits: Sequence[float] | None = None,
    exact: bool = True,
    realised: Literal["divergence"] | Callable[[nn.Module], float] | None = None,
    images: Tensor | None = None,
    **options: Unpack[SessionOptions],
) -> Frontier:
    """The Pareto set of budget and predicted loss.

    Args:
        model: the caller's; it is not modified.
        calibration: images, float (N, C, H, W), or how to make them; see `fxquant.compile`.
        axis: "mean_bits" (weights and activations alike) or one of "mean_weight_bits", "mean_activation_bits",
            "weight_bytes", "bit_operations", "latency_ms" (with backend="cpu-native").
        limits: budgets in that unit; by default a quarter bit apart over the whole range. Widths that the recipe avoids
            (`best`: 2 bits) are used at all limits if the lowest needs them.
        exact: solve the integer program at every budget, else take the convex hull.
        realised: measure every point: "divergence", mean divergence from the float model in the unit of the objective,
            or a function of the compiled model.
        images: what the divergence is measured on, float (N, C, H, W); the calibration images if not given.
        {options}

    Raises as `fxquant.compile` does; BudgetError for an unknown axis, InfeasibleBudgetError for a limit out of reach.
    """
    if limits is not None and len(limits) == 0:
        raise BudgetError("limits are empty: name budgets in the axis' unit, or give None")
    if images is not None:
        check_images(images)
    with shown(options.get("progress")) as progress:
        options["progress"] = progress  # one display for all that the session does
        session = Session(model, calibration, **options)
        with ranks.together(lambda: {"axis": axis, "limits": limits, "exact": exact}):
            return _frontier(session, axis, limits, exact, realised, images, options, progress)


def _frontier(
    session: Session,
    axis: str,
    limits: Sequence[float] | None,
    exact: bool,
    realised: Literal["divergence"] | Callable[[nn.Module], float] | None,
    images: Tensor | None,
    options: SessionOptions,
    progress: ProgressReporter,
) -> Frontier:
    lowest = budget_at(axis, min(limits)) if limits else None
    if lowest is not None:
        session.check(lowest)
    if images is not None and realised == "divergence":
        _check_like(images, session.calibration, options.get("image_sizes") or ())
    table = session.cost_table("W8A8, 1ms" if axis == "latency_ms" else "W8A8", lowest)
    wanted = default_limits(table, axis) if limits is None else limits
    task = progress.track("solving budgets", len(wanted))
    points = ranks.once(
        "solving budgets", lambda: frontier_of(table, axis, wanted, Milp() if exact else None, task.advance)
    )
    task.close()
    if realised is None:
        return Frontier(axis, tuple(points), unit=session.objective.unit)
    batch_size = options.get("batch_size", DEFAULT_BATCH_SIZE)
    measured = session.calibration if images is None else images
    measure = (
        _Divergence(session.float_model(), session.objective, measured, batch_size)
        if realised == "divergence"
        else realised
    )
    task = progress.track("measuring", len(points))
    losses = []
    for point in points:
        losses.append(number("what `realised` returns", measure(_compiled(session, point)), BudgetError))
        task.advance()
    task.close()
    name = "realised divergence" if realised == "divergence" else getattr(realised, "__name__", "realised")
    return Frontier(axis, tuple(points), tuple(losses), name, session.objective.unit)


def _check_like(images: Tensor, calibration: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise CalibrationError unless the float model and the compiled ones take images of this shape and dtype.

    Args:
        images: float (N, C, H, W), what is to be measured.
        calibration: the images that the model is calibrated on.
        sizes: further (height, width) that the compiled models take.
    """
    known = [tuple(calibration.shape[2:]), *map(tuple, sizes)]
    if images.shape[1] != calibration.shape[1] or tuple(images.shape[2:]) not in known:
        raise CalibrationError(
            f"the images to measure on have shape {tuple(images.shape)}, and the model is calibrated on "
            f"{tuple(calibration.shape)}: resize them alike"
        )
    if images.dtype != calibration.dtype:
        raise CalibrationError(
            f"the images to measure on are {images.dtype}, and those of the calibration {calibration.dtype}: give "
            f"images.to({calibration.dtype})"
        )


def _compiled(session: Session, point: FrontierPoint) -> Compiled:
    return session.compile(point.allocation.budget, _Known(point.allocation))


@dataclass(frozen=True)
class _Known:
    """An allocator whose answer is known."""

    allocation: Allocation

    def allocate(self, table: CostTable, budget: Budget) -> Allocation:
        """The allocation."""
        return self.allocation


class _Divergence:
    """Mean divergence of a model's output from the float model's, in the unit of an objective."""

    def __init__(self, model: nn.Module, objective: Objective, images_bchw: Tensor, batch_size: int) -> None:
        batches = torch.split(images_bchw, batch_size)
        self._model, self._objective = model, objective
        self._batches = [batch.to(device_of(model)) for batch in batches]
        self._expected: dict[int, Outputs] = {}  # of the batches that this rank measures on

    @exact()
    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> float:
        def divergence(index: int) -> float:
            images = self._batches[index]
            if index not in self._expected:
                self._expected[index] = self._doubled(self._model(images))
            return float(self._objective.divergence(self._expected[index], self._doubled(model(images))))

        total = sum(ranks.dealt("measuring", divergence, range(len(self._batches))))
        return total / sum(map(len, self._batches))

    def _doubled(self, output: Any) -> Outputs:
        found = self._objective.outputs(output, "the realised divergence", finite=False)
        return tuple(tensor.double() for tensor in found)
