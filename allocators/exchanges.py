"""Exchanges of bits that keep a budget: some layers step up one width, others pay by stepping down one.

    net = sum_up (E(b + 1) - E(b)) + sum_down (E(b - 1) - E(b)) < 0    with the usage afterwards within every limit

LampQ's iterative update exchanges one bit of one layer for one bit of another, which keeps the mean only where both
have equally many parameters; and prints gain and loss the wrong way round. Here up to `size` layers take part, so
that fc1 can be paid for by several smaller layers, and a step up for which there is room is an exchange too.
Deliberately not done: steps of more than one width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from allocators.problem.arrays import FloatArray, IntArray
from allocators.problem.budget import QUANTITIES, TOLERANCE, Budget
from allocators.problem.cost_table import Assignment, CostTable


class Step(NamedTuple):
    """One layer one width up (direction 1) or down (-1).

    Args:
        layer: its index.
        direction: 1 or -1.
        columns: of its first and second operand afterwards; -1 where it has none.
        usage: float64 [Q]: what the step adds to each budgeted quantity.
    """

    layer: int
    direction: int
    columns: tuple[int, int]
    usage: FloatArray


def steps(table: CostTable, assignment: Assignment, layers: Sequence[int], budget: Budget, *, tied: bool) -> list[Step]:
    """All single steps of these layers to the next allowed widths, in order of layers, up before down.

    Args:
        table: the problem.
        assignment: int64 [2, L], where the steps start.
        layers: indices of the layers that may step.
        budget: says how means are averaged.
        tied: a weight and its input step together, and only together; otherwise each operand steps alone.
    """
    limited = [QUANTITIES.index(quantity) for quantity in budget.limits]
    meter = table.meter(budget)
    found = []
    for layer in layers:
        present = [row for row in (0, 1) if assignment[row, layer] >= 0]
        for direction in (1, -1):
            ahead = {row: _next(table, row, layer, int(assignment[row, layer]), direction) for row in present}
            for rows in [present] if tied and not table.is_product[layer] else [[row] for row in present]:
                if not rows or any(ahead[row] is None for row in rows):
                    continue
                columns = [ahead[row] if row in rows else int(assignment[row, layer]) for row in (0, 1)]
                moved = np.array([[int(assignment[row, layer]), columns[row]] for row in (0, 1)])
                bits = [side.bits_at(pair) for side, pair in zip(table.sides, moved, strict=True)]
                used = meter.use(layer, bits[0], bits[1])
                found.append(
                    Step(layer, direction, (int(moved[0, 1]), int(moved[1, 1])), (used[:, 1] - used[:, 0])[limited])
                )
    return found


def _next(table: CostTable, row: int, layer: int, column: int, direction: int) -> int | None:
    allowed = table.sides[row].columns(layer)
    ahead = allowed[allowed > column] if direction > 0 else allowed[allowed < column][::-1]
    return int(ahead[0]) if ahead.size else None


def exchanges(
    table: CostTable, assignment: Assignment, budget: Budget, offered: Sequence[Step], change: FloatArray, size: int = 3
) -> Iterator[tuple[float, list[Step]]]:
    """Exchanges that promise to lower the error and keep the budget, best first: (net, steps).

    Args:
        table: the problem.
        assignment: int64 [2, L], where the steps start.
        budget: what an exchange has to keep.
        offered: S single steps.
        change: float64 [S]: what each offered step adds to the error.
        size: layers that take part, 1 to 3; at least one steps up, none twice.
    """
    limits = np.array(list(budget.limits.values())) * (1 + TOLERANCE)
    room = limits - np.array([table.usage(assignment, budget)[quantity] for quantity in budget.limits])
    usage = np.array([step.usage for step in offered]).reshape(len(offered), len(limits))
    layer = np.array([step.layer for step in offered])
    up = np.array([step.direction > 0 for step in offered], dtype=bool)
    groups = [_fitting(group, usage, layer, change, room) for group in _groups(up, size)]
    nets = np.concatenate([net for _, net in groups]) if groups else np.zeros(0)
    members = [row for group, _ in groups for row in group.tolist()]
    for index in np.argsort(nets, kind="stable").tolist():
        yield float(nets[index]), [offered[member] for member in members[index]]


def _groups(up: np.ndarray, size: int) -> Iterator[IntArray]:
    """Index tuples [M, k] of one step up, one up and one down, one and two, two and one."""
    ups, downs = np.flatnonzero(up), np.flatnonzero(~up)
    yield ups[:, None]
    if size >= 2:
        yield _product(ups[:, None], downs[:, None])
    if size >= 3:
        yield _product(ups[:, None], _pairs(downs))
        yield _product(_pairs(ups), downs[:, None])


def _product(left: IntArray, right: IntArray) -> IntArray:
    a, b = np.meshgrid(np.arange(len(left)), np.arange(len(right)), indexing="ij")
    return np.concatenate([left[a.ravel()], right[b.ravel()]], axis=1)


def _pairs(indices: IntArray) -> IntArray:
    first, second = np.triu_indices(len(indices), k=1)
    return np.stack([indices[first], indices[second]], axis=1)


def _fitting(
    group: IntArray, usage: FloatArray, layer: IntArray, change: FloatArray, room: FloatArray
) -> tuple[IntArray, FloatArray]:
    """The tuples that lower the error, fit and name no layer twice, with their nets."""
    net = change[group].sum(axis=1)
    group, net = group[net < 0], net[net < 0]
    layers = np.sort(layer[group], axis=1)
    kept = (usage[group].sum(axis=1) <= room).all(axis=1) & (layers[:, 1:] != layers[:, :-1]).all(axis=1)
    return group[kept], net[kept]
