"""The allocation problem as plain arrays: two operands of every layer x candidate widths, what each costs and uses.

    objective = sum_l cost[0, l, b_0l] + cost[1, l, b_1l]    (additive, as in LampQ's integer program)

A layer multiplies two operands: a weight and its input, or the left and the right input of a product, as in attention.
Two inputs that have to share one width are one variable, which stands in the second row for both.

Deliberately not done: costs that couple two operands.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Final, Self

import numpy as np

from allocators.problem.arrays import BoolArray, FloatArray, IntArray
from allocators.problem.budget import Budget
from allocators.problem.feasibility import infeasibility
from allocators.problem.latency_table import Latency, check_latency
from allocators.problem.operands import Choices, Place, Side
from allocators.problem.overrides import Bits, restrict
from allocators.problem.usage import FLOAT_BITS, Meter
from fxquant.errors import ArtefactError, InfeasibleBudgetError, OverrideError, SensitivityError

Assignment = IntArray
"""Chosen columns, int64 [2, L]: of the first and of the second operand of every layer, -1 where there is none."""

MATMUL_ROLES: Final = ("qk", "av")
"""Roles whose two operands are both inputs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CostTable:
    """L layers of two operands against C candidate widths; arrays are copied and made read-only.

    Args:
        layers: L distinct names.
        roles: L roles; "qk" and "av" are products of two inputs.
        elements: int64 [2, L]: elements of the weight, of a product's left input (row 0), and of the input or the right
            input (row 1), per image; 0 for what is absent or stays float. Of tied inputs row 1 has both.
        macs: int64 [L]: multiply-accumulates per image.
        bits: C candidate widths, ascending.
        cost: float64 [2, L, C]: predicted loss, >= 0.
        sqnr_db: float64 [2, L, C].
        allowed: bool [2, L, C]: candidates left by the policies and overrides.
        tied: bool [L]: products whose two inputs share one width; where not given, those without a left input.
        fixed_bits: int64 [2, L]: bits of an operand outside the allocation; 32, float, where not given.
        latency_ms: float64 [L, C, C]: predicted time at each pair of widths, never less at a wider one; what takes the
            same time whatever is chosen counts with any one layer. None: not known. Rounded to nanoseconds.

    Raises:
        SensitivityError: a shape is wrong, or a cost or SQNR is NaN, infinite or negative (an SQNR may be infinite
            or negative), or a latency falls with the width; the message names the layer and the width.
        OverrideError: a layer is left without any allowed width.
    """

    layers: tuple[str, ...]
    roles: tuple[str, ...]
    elements: IntArray
    macs: IntArray
    bits: tuple[int, ...]
    cost: FloatArray
    sqnr_db: FloatArray
    allowed: BoolArray
    tied: BoolArray | None = None
    fixed_bits: IntArray | None = None
    latency_ms: FloatArray | None = None

    def __post_init__(self) -> None:
        """Copy, check and lock every array."""
        for name, kind in (("layers", str), ("roles", str), ("bits", int)):
            object.__setattr__(self, name, tuple(kind(item) for item in getattr(self, name)))
        if len(set(self.layers)) != len(self.layers) or not self.layers:
            raise SensitivityError("a cost table needs at least one layer, and every layer name once")
        count, widths = len(self.layers), len(self.bits)
        if len(self.roles) != count:
            raise SensitivityError(f"roles must have one entry per layer ({count}), found {len(self.roles)}")
        if not self.bits or self.bits[0] < 1 or any(low >= high for low, high in itertools.pairwise(self.bits)):
            raise SensitivityError(f"bits must be positive and ascending, found {self.bits}")
        self._lock("macs", (count,), np.int64)
        self._lock("elements", (2, count), np.int64)
        for name, dtype in (("cost", np.float64), ("sqnr_db", np.float64), ("allowed", np.bool_)):
            self._lock(name, (2, count, widths), dtype)
        if self.tied is None:
            object.__setattr__(self, "tied", self.is_product & (self.elements[0] == 0))
        if self.fixed_bits is None:
            object.__setattr__(self, "fixed_bits", np.full((2, count), FLOAT_BITS))
        self._lock("tied", (count,), np.bool_)
        self._lock("fixed_bits", (2, count), np.int64)
        if (self.tied & ((self.elements[0] > 0) | ~self.is_product)).any():
            raise SensitivityError("tied are products of two inputs, whose elements stand together in the second row")
        for side in self.sides:
            self._check(side)
        if self.latency_ms is not None:
            self._lock("latency_ms", (count, widths, widths), np.float64)
            check_latency(self.layers, self.latency_ms)

    def _lock(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        try:
            array = np.array(getattr(self, name), dtype=dtype)
        except (TypeError, ValueError) as error:
            raise SensitivityError(f"{name} cannot be read as {dtype.__name__}: {error}") from error
        if array.shape != shape:
            raise SensitivityError(f"{name} must have shape {shape}, found {array.shape}")
        if dtype is np.int64 and (array < 0).any():
            raise SensitivityError(f"{name} of layer {self.layers[np.argwhere(array < 0)[0][-1]]!r} is negative")
        array.setflags(write=False)
        object.__setattr__(self, name, array)

    def _check(self, side: Side) -> None:
        present = side.elements[:, None] > 0
        bad = {"cost": ~np.isfinite(side.cost) | (side.cost < 0), "sqnr_db": np.isnan(side.sqnr_db)}
        for kind, mask in bad.items():
            for layer, column in np.argwhere(mask & present)[:1]:
                value = getattr(side, kind)[layer, column]
                raise SensitivityError(
                    f"{side.places[layer]} {kind} of layer {self.layers[layer]!r} at {side.bits[column]} bits is "
                    f"{value}; a cost must be finite and >= 0 and an SQNR not NaN: check this layer's scores"
                )
        for layer in np.flatnonzero(present[:, 0] & ~side.allowed.any(axis=1))[:1]:
            raise OverrideError(
                f"layer {self.layers[layer]!r} is left without any allowed {side.places[layer]} width; "
                f"allow one of {list(self.bits)}"
            )

    @cached_property
    def is_product(self) -> BoolArray:
        """Layers that multiply two inputs, bool [L]; the others multiply an input by a weight."""
        return np.isin(self.roles, MATMUL_ROLES)

    @cached_property
    def sides(self) -> tuple[Side, Side]:
        """The first operands and the second ones, in the row order of an assignment."""
        free = self.is_product & ~np.asarray(self.tied)
        names: tuple[tuple[Place, Place], tuple[Place, Place]] = (("weight", "left"), ("activation", "right"))
        first, second = (
            Side(
                tuple(kinds[int(is_free)] for is_free in free),
                np.array(self.bits),
                self.elements[row],
                self.cost[row],
                self.sqnr_db[row],
                self.allowed[row],
            )
            for row, kinds in enumerate(names)
        )
        return first, second

    @cached_property
    def is_weight(self) -> BoolArray:
        """Operands that are weights, bool [2, L]; all others are activations."""
        return np.stack([~self.is_product, np.zeros(len(self.layers), dtype=bool)])

    def operand(self, row: int, layer: int) -> str:
        """The name by which overrides and allocations know an operand: the layer's, or "<layer>.left", ".right"."""
        place = self.sides[row].places[layer]
        return f"{self.layers[layer]}.{place}" if place in ("left", "right") else self.layers[layer]

    def meter(self, budget: Budget | None = None) -> Meter:
        """What bits use, averaged as `budget` asks (by elements without one)."""
        latency = None if self.latency_ms is None else Latency.of(self.latency_ms, self.bits)
        tied, fixed = np.asarray(self.tied), np.asarray(self.fixed_bits)
        return Meter.of(self.elements, self.is_weight, self.macs, tied, fixed, budget, latency)

    def widths(self, assignment: Assignment) -> IntArray:
        """Bits of an assignment, int64 [2, L]; 0 where a layer has no such operand."""
        return np.stack([side.bits_at(columns) for side, columns in zip(self.sides, assignment, strict=True)])

    def usage(self, assignment: Assignment, budget: Budget | None = None) -> dict[str, float]:
        """The QUANTITIES of an assignment: mean bits, mean bits, bytes, bit operations and, where known, latency."""
        return self.meter(budget).total(*self.widths(assignment))

    def minimum_usage(self, budget: Budget | None = None, *, tied: bool = False) -> dict[str, float]:
        """The least of every quantity; the lowest widths reach all of them together."""
        return self.usage(self.lowest(tied=tied), budget)

    def objective(self, assignment: Assignment) -> float:
        """The summed predicted loss of an assignment."""
        layers = np.arange(len(self.layers))
        costs = [
            np.where(columns >= 0, side.cost[layers, columns], 0.0)
            for side, columns in zip(self.sides, assignment, strict=True)
        ]
        return float(np.sum(costs))

    def choices(self, layer: int, budget: Budget | None = None, *, tied: bool = False) -> Choices:
        """The allowed pairs of a layer; `tied` keeps those with equal bits where it has both a weight and an input.

        A layer with a single allowed pair keeps it: what is pinned is not tied.

        Args:
            layer: its index.
            budget: says how means are averaged; None: by elements.
            tied: keep only pairs of equal bits where the layer has both a weight and an input.
        """
        sides = self.sides
        grid = np.meshgrid(*(side.columns(layer) for side in sides), indexing="ij")
        columns = np.stack([axis.ravel() for axis in grid])
        bits = np.stack([side.bits_at(chosen) for side, chosen in zip(sides, columns, strict=True)])
        if tied and not self.is_product[layer] and columns.shape[1] > 1 and (columns[:, 0] >= 0).all():
            equal = bits[0] == bits[1]
            if not equal.any():
                raise OverrideError(
                    f"layer {self.layers[layer]!r} has no width allowed for both its weights {set(bits[0].tolist())} "
                    f"and its activations {set(bits[1].tolist())}; allow a common one, or do not tie them"
                )
            columns, bits = columns[:, equal], bits[:, equal]
        cost = sum(
            (np.where(chosen >= 0, side.cost[layer, chosen], 0.0) for side, chosen in zip(sides, columns, strict=True)),
            start=np.zeros(columns.shape[1]),
        )
        return Choices(columns, bits, cost, self.meter(budget).use(layer, *bits))

    def uniform(self, weight_bits: float, activation_bits: float) -> Assignment:
        """Every weight and every activation at these widths, or the nearest allowed (the lower of two equally near)."""
        targets = np.where(self.is_weight, weight_bits, activation_bits)
        chosen = [
            [columns[np.abs(side.bits_at(columns) - targets[row, layer]).argmin()]]
            for row, side in enumerate(self.sides)
            for layer, columns in enumerate(map(side.columns, self._range))
        ]
        return np.array(chosen, dtype=np.int64).reshape(2, -1)

    def lowest(self, *, tied: bool = False) -> Assignment:
        """Every layer at its lowest allowed width (at its lowest common one when `tied`)."""
        if tied:
            return np.stack([self.choices(layer, tied=True).columns[:, 0] for layer in self._range], axis=1)
        return np.array([[side.columns(layer)[0] for layer in self._range] for side in self.sides])

    def highest(self) -> Assignment:
        """Every layer at its highest allowed width."""
        return np.array([[side.columns(layer)[-1] for layer in self._range] for side in self.sides])

    @property
    def _range(self) -> range:
        return range(len(self.layers))

    def check_feasible(self, budget: Budget, *, tied: bool = False) -> None:
        """Do nothing when the lowest widths meet `budget`.

        Raises:
            InfeasibleBudgetError: they do not; the message names each quantity, its minimum and the layers pinning it.
        """
        exceeded = budget.exceeded(self.minimum_usage(budget, tied=tied))
        if exceeded:
            raise InfeasibleBudgetError(infeasibility(self, budget, exceeded, tied=tied))

    def override(self, patterns: Mapping[str, Bits]) -> CostTable:
        """A new table in which the matched layers have one allowed width; a later entry wins over an earlier one.

        Args:
            patterns: exact layer name, role or glob -> bits of all operands, or (weight bits, activation bits) where
                `None` leaves an operand as it is; or such a name with ".left" or ".right" -> bits of one input of a
                product. A name is tried first, then a role, then a glob. An override wins over the masks of this table.

        Raises:
            OverrideError: a pattern matches nothing, or a width is not a candidate.
        """
        return replace(self, allowed=np.stack(restrict(self.layers, self.roles, self.sides, patterns)))

    def at_least(self, minimum_bits: int, spared: Sequence[str] = ()) -> CostTable:
        """A new table without the widths below `minimum_bits`, except where an operand is allowed nothing else.

        spared: operands that stay as they are, by role and place, such as "av.left".
        """
        kept = self.allowed & (np.array(self.bits) >= minimum_bits)
        is_spared = [
            [f"{role}.{place}" in spared for role, place in zip(self.roles, side.places, strict=True)]
            for side in self.sides
        ]
        as_it_is = ~kept.any(axis=2) | np.array(is_spared)
        return replace(self, allowed=np.where(as_it_is[..., None], self.allowed, kept))

    def to_dict(self) -> dict[str, Any]:
        """All fields as lists, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value and list(value)
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ArtefactError: a field is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ArtefactError(f"not a cost table: missing or unknown fields {sorted(names ^ set(values))}")
        return cls(**values)
