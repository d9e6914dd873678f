"""The page's table of operands: histogram with levels, width, ratio, losses, kernel and share of time of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxquant.checks.untrusted import POSITIVE, TEXT, mapped, record
from fxquant.graph.annotation import Source
from fxquant.quantizers.statistics.outline import CHANNEL, ROW, Outline
from fxquant.report.charts import histogram, share_bar
from fxquant.report.evidence import Evidence
from fxquant.runtime.layer_row import LayerRow, OperandRow

TIMES = "layer_times"
"""The card's entry of measured times; see `fxquant.measure.layer_times`."""

_UNITS = {ROW: "relative to the largest of a row", CHANNEL: "divided by the channel's factor"}


@dataclass(frozen=True)
class Times:
    """How long kernels took, each alone, and the whole model.

    Args:
        layers: ms by layer.
        whole_ms: of the whole model.
        of_what: what was timed, on which machine.
    """

    layers: Mapping[str, float]
    whole_ms: float
    of_what: str

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Times | None:
        """The times in a card, None without. Raises ArtefactError for an entry of another shape."""
        if TIMES not in card:
            return None
        rules = {"layers": mapped(POSITIVE), "whole_ms": POSITIVE, "of_what": TEXT}
        return cls(**record(card[TIMES], rules, "the card's times of layers"))


def layer_views(
    layers: Sequence[LayerRow], evidence: Evidence, times: Times | None, total_loss: float
) -> list[dict[str, Any]]:
    """One entry a layer, with one for each of its operands, as the template shows them.

    Args:
        layers: one row per quantized layer.
        evidence: histograms, levels, losses.
        times: of layers; None: not measured.
        total_loss: the sum that shares are of.
    """
    losses = [_loss(row, index, o, evidence) or 0.0 for row in layers for index, o in enumerate(row.operands)]
    largest = max(losses, default=0.0)
    return [_layer(row, evidence, times, total_loss, largest) for row in layers]


def _layer(
    row: LayerRow, evidence: Evidence, times: Times | None, total_loss: float, largest_loss: float
) -> dict[str, Any]:
    operands = [_operand(row, index, operand, evidence, largest_loss) for index, operand in enumerate(row.operands)]
    time = ""
    if times is not None and row.layer in times.layers:
        found = times.layers[row.layer]
        time = f"{found:.3f} ms" + (f", {found / times.whole_ms:.1%}" if times.whole_ms else "")
    return {
        "name": row.layer,
        "role": row.role,
        "share": f"{row.predicted_loss / total_loss:.1%}" if total_loss > 0 else "",
        "kernel": row.execution,
        "time": time or "-",
        "operands": operands,
    }


def _operand(row: LayerRow, index: int, operand: OperandRow, evidence: Evidence, largest: float) -> dict[str, Any]:
    outline, levels = _at(evidence.outlines, row.layer, index), _at(evidence.levels, row.layer, index)
    loss = _loss(row, index, operand, evidence)
    realised = _at(evidence.realised, row.layer, index)
    return {
        "key": f"{row.layer} {index}",
        "place": place_of(row, index),
        "holds": _holds(operand),
        "bits": operand.bits,
        "pinned": operand.pinned,
        "quantizer": operand.quantizer or "-",
        "sqnr": "-" if operand.sqnr_db is None else f"{operand.sqnr_db:.1f} dB",
        "loss": "-" if loss is None else f"{loss:.2e}",
        "bar": "" if loss is None or largest <= 0 else share_bar(loss / largest),
        "realised": "-" if realised is None else f"{realised:.2e}",
        "histogram": "" if outline is None else histogram(outline, levels or None),
        "low": "" if outline is None else _end(outline.low, outline),
        "high": "" if outline is None else _end(outline.high, outline),
        "unit": "" if outline is None else _UNITS.get(outline.unit, ""),
    }


def _holds(operand: OperandRow) -> str:
    """What it holds, where that says more than its place, and how much of it."""
    source = operand.source.replace("_", " ")
    return f"{operand.elements:,} elements" + ("" if source in ("weight", "other") else f", {source}")


def _end(value: float, outline: Outline) -> str:
    """An end of a histogram; 0 for what is nothing beside its span."""
    return "0" if abs(value) < 1e-3 * (outline.high - outline.low) else f"{value:.3g}"


def place_of(row: LayerRow, index: int) -> str:
    """What an operand is in its layer: weight, input, left or right."""
    if row.operands[index].source == Source.WEIGHT:
        return "weight"
    return ("left", "right")[index] if len(row.inputs) == 2 else "input"


def _loss(row: LayerRow, index: int, operand: OperandRow, evidence: Evidence) -> float | None:
    """What the cost table says of the operand's width; of tied inputs, and without a table, what is known together."""
    table = evidence.table
    if operand.bits is None:
        return None
    if table is None or row.layer not in table.layers or operand.bits not in table.bits:
        return row.predicted_loss if len(row.operands) == 1 else None
    layer, column = table.layers.index(row.layer), table.bits.index(operand.bits)
    side = 0 if index == 0 and table.elements[0, layer] > 0 else 1
    if side == 1 and not table.elements[1, layer]:
        return None
    is_second_of_tied = len(row.inputs) == 2 and not table.elements[0, layer] and index == 0
    return None if is_second_of_tied else float(table.cost[side, layer, column])


def _at(found: Mapping[str, Sequence[Any]], layer: str, index: int) -> Any:
    """Of one operand; None where nothing is known of it."""
    items = found.get(layer, ())
    return items[index] if index < len(items) else None
