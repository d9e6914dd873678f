"""The answer of an allocator: bits by layer, what they cost and use, and how good the answer is known to be.

Deliberately not done: scales and quantizers, which belong to the graph.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

import numpy as np

from allocators.problem.budget import QUANTITIES, TOLERANCE, Budget
from allocators.problem.cost_table import Assignment, CostTable
from fxquant.errors import ArtefactError, BudgetError

Status = Literal["optimal", "feasible", "heuristic"]
"""Proven within the solver's gap; found by a solver but not proven; found by a rule that proves nothing."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bits by layer; equality ignores the time it took.

    Args:
        weight_bits: bits of the layers that have quantized weights.
        activation_bits: bits of the layers whose input is quantized; the inputs of a product that have widths of their
            own have names of their own, "<layer>.left" and "<layer>.right".
        objective: summed predicted loss.
        usage: the QUANTITIES, averaged as the budget asks; latency_ms where times were measured.
        budget: what was asked.
        status: "optimal", "feasible" or "heuristic".
        gap: (objective - bound) / objective, or `None` when no bound is known.
        binding: budgeted quantities into which no one-step upgrade of any layer fits.
        solver: what found it.
        seconds: wall time, s.
    """

    weight_bits: dict[str, int]
    activation_bits: dict[str, int]
    objective: float
    usage: dict[str, float]
    budget: Budget
    status: Status
    gap: float | None
    binding: tuple[str, ...]
    solver: str
    seconds: float = field(compare=False)

    @classmethod
    def of(
        cls,
        table: CostTable,
        assignment: Assignment,
        budget: Budget,
        *,
        status: Status,
        gap: float | None,
        solver: str,
        seconds: float,
    ) -> Self:
        """The allocation that an assignment of `table` stands for.

        Args:
            table: the problem.
            assignment: int64 [2, L], the chosen columns.
            budget: what was asked.
            status: "optimal", "feasible" or "heuristic".
            gap: how far the objective can be from the best, proven; None where no bound is known.
            solver: what found it.
            seconds: wall time, s.
        """
        widths, is_weight = table.widths(assignment), table.is_weight
        weights, activations = (
            {
                table.operand(row, layer): int(widths[row, layer])
                for layer, row in np.argwhere((counted & (widths > 0)).T)
            }
            for counted in (is_weight, ~is_weight)
        )
        return cls(
            weight_bits=weights,
            activation_bits=activations,
            objective=table.objective(assignment),
            usage=table.usage(assignment, budget),
            budget=budget,
            status=status,
            gap=gap,
            binding=_binding(table, assignment, budget),
            solver=solver,
            seconds=seconds,
        )

    def assignment(self, table: CostTable) -> Assignment:
        """The columns of these bits in a table that has them, int64 [2, L].

        Raises:
            BudgetError: a width is none of the table's candidates.
        """
        columns = np.full((2, len(table.layers)), -1, dtype=np.int64)
        for row, layer in np.argwhere(table.elements > 0).tolist():
            bits = self.weight_bits if table.is_weight[row, layer] else self.activation_bits
            width = bits.get(table.operand(row, layer))
            if width is not None and width not in table.bits:
                raise BudgetError(f"{table.operand(row, layer)!r} is given {width} bits; candidates are {table.bits}")
            columns[row, layer] = -1 if width is None else table.bits.index(width)
        return columns

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal allocation."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ArtefactError: the text is not JSON, or not an allocation; the message names the field.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtefactError(f"not an allocation: the text is not JSON ({error})") from error
        names = {item.name for item in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ArtefactError(f"not an allocation: it must be an object with the fields {', '.join(sorted(names))}")
        try:
            budget = values["budget"] = Budget.from_dict(values["budget"])
            limits = budget.limits
        except (BudgetError, TypeError, AttributeError, OverflowError) as error:
            raise ArtefactError(f"not an allocation: bad field 'budget' ({error})") from error
        for name, valid in _VALID.items():
            if not valid(values[name]):
                raise ArtefactError(f"not an allocation: bad field {name!r}, found {values[name]!r:.200}")
        if missing := [quantity for quantity in limits if quantity not in values["usage"]]:
            raise ArtefactError(f"not an allocation: bad field 'usage', which lacks {', '.join(missing)}")
        return cls(**values | {"binding": tuple(values["binding"])})


_LARGEST, _WIDEST = 1e300, 64


def _is_number(value: Any) -> bool:
    # Compared, not math.isfinite, which takes no whole number beyond the floats.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_widths(value: Any) -> bool:
    return isinstance(value, dict) and all(type(width) is int and 0 < width <= _WIDEST for width in value.values())


def _is_usage(value: Any) -> bool:
    is_named = isinstance(value, dict) and {*value, "latency_ms"} == set(QUANTITIES)
    return is_named and all(map(_is_number, value.values()))


_VALID = {
    "weight_bits": _is_widths,
    "activation_bits": _is_widths,
    "objective": _is_number,
    "usage": _is_usage,
    "status": lambda value: value in get_args(Status),
    "gap": lambda value: value is None or _is_number(value),
    "binding": lambda value: isinstance(value, list) and all(item in QUANTITIES for item in value),
    "solver": lambda value: isinstance(value, str),
    "seconds": _is_number,
}


def _binding(table: CostTable, assignment: Assignment, budget: Budget) -> tuple[str, ...]:
    """The budgeted quantities that some one-step upgrade would raise, and that none can raise within the limit."""
    upgrades = []
    for row, side in enumerate(table.sides):
        for layer in range(len(table.layers)):
            wider = side.columns(layer)
            wider = wider[wider > assignment[row, layer]]
            if wider.size:
                upgrades.append(assignment.copy())
                upgrades[-1][row, layer] = wider[0]
    if not upgrades:
        return ()
    meter = table.meter(budget)
    usage = meter.sums(*table.widths(assignment))
    raised = meter.sums(*table.widths(np.stack(upgrades, axis=1)))
    found = []
    for quantity, limit in budget.limits.items():
        index = QUANTITIES.index(quantity)
        above = raised[index][raised[index] > usage[index]]
        if above.size and above.min() > limit * (1 + TOLERANCE):
            found.append(quantity)
    return tuple(found)
