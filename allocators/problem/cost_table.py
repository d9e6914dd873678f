"""The allocation problem as plain arrays: layers x candidate widths, with what each width costs and uses.

    objective = sum_l weight_cost[l, W_l] + activation_cost[l, A_l]    (additive, as in LampQ's integer program)

Deliberately not done: costs that couple two layers, or the weight and the activation of one layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

import numpy as np

from allocators.problem.arrays import BoolArray, FloatArray, IntArray
from allocators.problem.budget import Budget
from allocators.problem.feasibility import infeasibility
from allocators.problem.latency_table import Latency, check_latency
from allocators.problem.operands import Choices, Operand
from allocators.problem.overrides import Bits, restrict
from allocators.problem.usage import FLOAT_BITS, Meter
from fxquant.errors import ArtefactError, InfeasibleBudgetError, OverrideError, SensitivityError

Assignment = IntArray
"""Chosen columns, int64 [2, L]: row 0 weights, row 1 activations, -1 where a layer has none."""

MATMUL_ROLES: Final = ("qk", "av")
"""Roles whose two operands are both activations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CostTable:
    """L layers against W weight widths and A activation widths; arrays are copied and made read-only.

    Args:
        layers: L distinct names.
        roles: L roles; "qk" and "av" are matmuls of two activations.
        weight_elements: int64 [L]: weights per layer; 0 for a layer without quantized weights.
        activation_elements: int64 [L]: input elements per image; 0 for an input that stays float.
        macs: int64 [L]: multiply-accumulates per image.
        weight_bits: W candidate widths, ascending.
        activation_bits: A candidate widths, ascending.
        weight_cost: float64 [L, W]: predicted loss, >= 0.
        activation_cost: float64 [L, A]: predicted loss, >= 0.
        weight_sqnr_db: float64 [L, W].
        activation_sqnr_db: float64 [L, A].
        allowed_weight: bool [L, W]: candidates left by the policies and overrides.
        allowed_activation: bool [L, A].
        fixed_activation_bits: int64 [L]: bits of an input outside the allocation; 32, float, where not given.
        left_bits: int64 [L]: bits of a matmul's left operand where a layer of its own stands for it in the table, which
            has its elements and its cost; else 0, as where not given.
        latency_ms: float64 [L, W, A]: predicted time at each pair of widths, never less at a wider one; what takes the
            same time whatever is chosen counts with any one layer. None: not known. Rounded to nanoseconds.

    Raises:
        SensitivityError: a shape is wrong, or a cost or SQNR is NaN, infinite or negative (an SQNR may be infinite
            or negative), or a latency falls with the width; the message names the layer and the width.
        OverrideError: a layer is left without any allowed width.
    """

    layers: tuple[str, ...]
    roles: tuple[str, ...]
    weight_elements: IntArray
    activation_elements: IntArray
    macs: IntArray
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    weight_cost: FloatArray
    activation_cost: FloatArray
    weight_sqnr_db: FloatArray
    activation_sqnr_db: FloatArray
    allowed_weight: BoolArray
    allowed_activation: BoolArray
    fixed_activation_bits: IntArray | None = None
    left_bits: IntArray | None = None
    latency_ms: FloatArray | None = None

    def __post_init__(self) -> None:
        """Copy, check and lock every array."""
        for name, kind in (("layers", str), ("roles", str), ("weight_bits", int), ("activation_bits", int)):
            object.__setattr__(self, name, tuple(kind(item) for item in getattr(self, name)))
        if len(set(self.layers)) != len(self.layers) or not self.layers:
            raise SensitivityError("a cost table needs at least one layer, and every layer name once")
        count = len(self.layers)
        if len(self.roles) != count:
            raise SensitivityError(f"roles must have one entry per layer ({count}), found {len(self.roles)}")
        self._lock("macs", (count,), np.int64)
        if self.fixed_activation_bits is None:
            object.__setattr__(self, "fixed_activation_bits", np.full(count, FLOAT_BITS))
        self._lock("fixed_activation_bits", (count,), np.int64)
        if self.left_bits is None:
            object.__setattr__(self, "left_bits", np.zeros(count, dtype=np.int64))
        self._lock("left_bits", (count,), np.int64)
        for side, widths in (("weight", self.weight_bits), ("activation", self.activation_bits)):
            if not widths or widths[0] < 1 or any(low >= high for low, high in itertools.pairwise(widths)):
                raise SensitivityError(f"{side}_bits must be positive and ascending, found {widths}")
            self._lock(f"{side}_elements", (count,), np.int64)
            for name in (f"{side}_cost", f"{side}_sqnr_db"):
                self._lock(name, (count, len(widths)), np.float64)
            self._lock(f"allowed_{side}", (count, len(widths)), np.bool_)
        for operand in self.operands:
            self._check(operand)
        if self.latency_ms is not None:
            self._lock("latency_ms", (count, len(self.weight_bits), len(self.activation_bits)), np.float64)
            check_latency(self.layers, self.latency_ms)

    def _lock(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        try:
            array = np.array(getattr(self, name), dtype=dtype)
        except (TypeError, ValueError) as error:
            raise SensitivityError(f"{name} cannot be read as {dtype.__name__}: {error}") from error
        if array.shape != shape:
            raise SensitivityError(f"{name} must have shape {shape}, found {array.shape}")
        if dtype is np.int64 and (array < 0).any():
            raise SensitivityError(f"{name} of layer {self.layers[int(array.argmin())]!r} is negative")
        array.setflags(write=False)
        object.__setattr__(self, name, array)

    def _check(self, operand: Operand) -> None:
        present = operand.elements[:, None] > 0
        bad = {"cost": ~np.isfinite(operand.cost) | (operand.cost < 0), "sqnr_db": np.isnan(operand.sqnr_db)}
        for kind, mask in bad.items():
            for layer, column in np.argwhere(mask & present)[:1]:
                value = getattr(operand, kind)[layer, column]
                raise SensitivityError(
                    f"{operand.name}_{kind} of layer {self.layers[layer]!r} at {operand.bits[column]} bits is {value}; "
                    f"a cost must be finite and >= 0 and an SQNR not NaN: check this layer's scores"
                )
        for layer in np.flatnonzero(present[:, 0] & ~operand.allowed.any(axis=1))[:1]:
            raise OverrideError(
                f"layer {self.layers[layer]!r} is left without any allowed {operand.name} width; "
                f"allow one of {operand.bits.tolist()}"
            )

    @property
    def operands(self) -> tuple[Operand, Operand]:
        """The weights' side and the activations' side, in the row order of an assignment."""
        weights = (self.weight_elements, self.weight_cost, self.weight_sqnr_db, self.allowed_weight)
        activations = (
            self.activation_elements,
            self.activation_cost,
            self.activation_sqnr_db,
            self.allowed_activation,
        )
        return (
            Operand("weight", np.array(self.weight_bits), *weights),
            Operand("activation", np.array(self.activation_bits), *activations),
        )

    def meter(self, budget: Budget | None = None) -> Meter:
        """What bits use, averaged as `budget` asks (by elements without one)."""
        matmul = np.isin(self.roles, MATMUL_ROLES)
        fixed = np.asarray(self.fixed_activation_bits)
        times = self.latency_ms
        latency = None if times is None else Latency.of(times, self.weight_bits, self.activation_bits)
        left = np.asarray(self.left_bits)
        return Meter.of(self.weight_elements, self.activation_elements, self.macs, matmul, fixed, left, budget, latency)

    def bits(self, assignment: Assignment) -> IntArray:
        """Weight bits and activation bits of an assignment, int64 [2, L]; 0 where a layer has none."""
        return np.stack([side.bits_at(columns) for side, columns in zip(self.operands, assignment, strict=True)])

    def usage(self, assignment: Assignment, budget: Budget | None = None) -> dict[str, float]:
        """The QUANTITIES of an assignment: mean bits, mean bits, bytes, bit operations and, where known, latency."""
        return self.meter(budget).total(*self.bits(assignment))

    def minimum_usage(self, budget: Budget | None = None, *, tied: bool = False) -> dict[str, float]:
        """The least of every quantity; the lowest widths reach all of them together."""
        return self.usage(self.lowest(tied=tied), budget)

    def objective(self, assignment: Assignment) -> float:
        """The summed predicted loss of an assignment."""
        layers = np.arange(len(self.layers))
        costs = [
            np.where(columns >= 0, side.cost[layers, columns], 0.0)
            for side, columns in zip(self.operands, assignment, strict=True)
        ]
        return float(np.sum(costs))

    def choices(self, layer: int, budget: Budget | None = None, *, tied: bool = False) -> Choices:
        """The allowed pairs of a layer; `tied` keeps those with equal bits where the layer has both operands.

        A layer with a single allowed pair keeps it: what is pinned is not tied.
        """
        weights, activations = self.operands
        grid = np.meshgrid(weights.columns(layer), activations.columns(layer), indexing="ij")
        columns = np.stack([axis.ravel() for axis in grid])
        bits = np.stack([weights.bits_at(columns[0]), activations.bits_at(columns[1])])
        if tied and columns.shape[1] > 1 and (columns[:, 0] >= 0).all():
            equal = bits[0] == bits[1]
            if not equal.any():
                raise OverrideError(
                    f"layer {self.layers[layer]!r} has no width allowed for both its weights {set(bits[0].tolist())} "
                    f"and its activations {set(bits[1].tolist())}; allow a common one, or do not tie them"
                )
            columns, bits = columns[:, equal], bits[:, equal]
        cost = sum(
            (
                np.where(chosen >= 0, side.cost[layer, chosen], 0.0)
                for side, chosen in zip(self.operands, columns, strict=True)
            ),
            start=np.zeros(columns.shape[1]),
        )
        return Choices(columns, bits, cost, self.meter(budget).use(layer, *bits))

    def uniform(self, weight_bits: float, activation_bits: float) -> Assignment:
        """Every layer at these widths, or at the nearest allowed ones (the lower of two equally near)."""
        return np.array(
            [
                [columns[np.abs(side.bits_at(columns) - target).argmin()] for columns in map(side.columns, self._range)]
                for side, target in zip(self.operands, (weight_bits, activation_bits), strict=True)
            ],
            dtype=np.int64,
        )

    def lowest(self, *, tied: bool = False) -> Assignment:
        """Every layer at its lowest allowed width (at its lowest common one when `tied`)."""
        return np.stack([self.choices(layer, tied=tied).columns[:, 0] for layer in self._range], axis=1)

    def highest(self) -> Assignment:
        """Every layer at its highest allowed width."""
        return np.stack([self.choices(layer).columns[:, -1] for layer in self._range], axis=1)

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
            patterns: exact layer name, role or glob -> bits of both operands, or (weight bits, activation bits) where
                `None` leaves an operand as it is. A name is tried first, then a role, then a glob. An override wins
                over the masks of this table.

        Raises:
            OverrideError: a pattern matches nothing, or a width is not a candidate.
        """
        weight, activation = restrict(self.layers, self.roles, self.operands, patterns)
        return replace(self, allowed_weight=weight, allowed_activation=activation)

    def at_least(self, minimum_bits: int) -> CostTable:
        """A new table without the widths below `minimum_bits`, except where a layer is allowed nothing else."""
        masks = []
        for side in self.operands:
            kept = side.allowed & (side.bits >= minimum_bits)
            masks.append(np.where(kept.any(axis=1, keepdims=True), kept, side.allowed))
        return replace(self, allowed_weight=masks[0], allowed_activation=masks[1])

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
