"""The report as one HTML file that needs no network: to read, to try other widths in, and to copy overrides from.

Everything a file says is text to the page: the templates escape it, and the page's own policy lets no script run but
ours, by its hash. The script adds up the cost table that the file holds (`fxquant.report.choices`).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fxquant.report import sections
from fxquant.report.charts import HEIGHTS
from fxquant.report.choices import choices
from fxquant.report.evidence import Evidence
from fxquant.report.frontier_chart import frontier_of
from fxquant.report.grid import grid_of, tiles_of
from fxquant.report.operand_table import Times, layer_views
from fxquant.report.palette import legend
from fxquant.report.sections import Cell, Table
from fxquant.runtime.layer_row import LayerRow

if TYPE_CHECKING:
    from fxquant.report.tables import Report

_TEMPLATES = Path(__file__).parent / "templates"
_SIMULATED = "simulated"


def to_html(report: Report) -> str:
    """The page of a report. Raises ArtefactError where its journal or card hold what passes do not write."""
    return render("page.html", "page.js", view=_view(report))


def render(template: str, script: str = "", **values: Any) -> str:
    """A template of this package with the page's style, and its script where it has one."""
    style, code = ((_TEMPLATES / name).read_text(encoding="utf-8") if name else "" for name in ("style.css", script))
    # Both are ours, and are told to the browser by their hash: nothing else in the file can run, or change its looks.
    texts = {"style_hash": _hash(style), "script_hash": _hash(code), "version": importlib.metadata.version("fxquant")}
    return _environment().get_template(template).render(style=Markup(style), script=Markup(code), **texts, **values)


@cache
def _environment() -> Environment:
    """Our templates, each of them compiled once a process: that takes as long as filling them."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["width_class"] = _width_class
    return environment


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _width_class(bits: int | None) -> str:
    """The CSS class of a width: of 2 to 8 bits, or float."""
    return "bf" if bits is None else f"b{min(max(bits, 2), 8)}"


def _view(report: Report) -> dict[str, Any]:
    """What the template shows, as texts, tables and markup of ours."""
    evidence = Evidence.of(report.journal)
    times = Times.of(report.card)
    is_lowered = any(row.execution != _SIMULATED for row in report.layers)
    head, protocol = (dict_of(section) for section in (report.sections()[0], sections.protocol(report.card)))
    found: dict[str, Any] = {
        "model": str(report.card.get("model", "unknown model")),
        "budget": "no budget" if report.allocation is None else str(report.allocation.budget),
        "lead": _lead(report),
        "is_random": report.card.get("weights") == "random",
        "tiles": _tiles(report),
        "lacks": evidence.lacks,
        **grid_view(report),
        "legend": LEGEND,
        "choices": _choices(report, evidence),
        "totals": sections.totals(report.totals),
        "frontier": frontier_of(evidence.table, report.allocation),
        "layers": layer_views(report.layers, evidence, times, report.totals.predicted_loss),
        "unit": unit_of(report),
        "heights": HEIGHTS,
        "has_outlines": bool(evidence.outlines),
        "has_realised": bool(evidence.realised),
        "times": "" if times is None else times.of_what,
        "misses": report.missed,
        "is_lowered": is_lowered,
        "stays_float": ", ".join(report.card.get("stays_float") or ()) or "nothing",
        "arithmetic": [text for label, text in head if label == "arithmetic"],
        "importance": _importance(evidence.importance, report.layers),
        "header": head,
        "protocol": protocol,
        "card": json.dumps(dict(report.card), indent=2, default=str),
        "journal": sections.journal_table(report.journal),
        "steps": [entry.step for entry in report.journal.entries],
    }
    return {**found, "sections": [(a, n) for a, n in _SECTIONS if found.get(a, True)]}


LEGEND = [None if label == "-" else int(label) for label, _ in legend()]
"""Widths from narrow to wide, then None for float."""


def grid_view(report: Report) -> dict[str, Any]:
    """The grid of blocks by roles, the layers before and after the blocks, and each layer's place in the report."""
    tiles = tiles_of(report.layers)
    first = next((i for i, tile in enumerate(tiles) if tile.block is not None), len(tiles))
    outside = [(i < first, tile) for i, tile in enumerate(tiles) if tile.block is None]
    return {
        "grid": grid_of(tiles),
        "before": [tile for is_before, tile in outside if is_before],
        "after": [tile for is_before, tile in outside if not is_before],
        "index": {row.layer: index for index, row in enumerate(report.layers)},
        "has_pairs": any("x" in tile.labels[1] for tile in tiles),
    }


_SECTIONS = (
    ("bits", "Bits"), ("totals", "Totals"), ("frontier", "Frontier"), ("operands", "Operands"), ("speed", "Speed"),
    ("importance", "Relevance"), ("protocol", "Protocol"), ("journal", "Journal"),
)  # fmt: skip


def dict_of(section: Any) -> list[tuple[str, str]]:
    """The labelled lines of a section."""
    return list(section.lines)


def unit_of(report: Report) -> str:
    """What losses are measured in."""
    return str((report.card.get("objective") or {}).get("unit", "the unit of the objective"))


def _choices(report: Report, evidence: Evidence) -> dict[str, Any] | None:
    if evidence.table is None or report.allocation is None:
        return None
    found = choices(evidence.table, report.layers, report.allocation)
    scored = any(entry.step.startswith("ScoreLayers") for entry in report.journal.entries)
    return {**found, "loss": "Summed score" if scored else "Predicted loss"}


def _lead(report: Report) -> str:
    """What was compiled, in one sentence."""
    recipe = report.card.get("recipe")
    by = f" by the recipe {recipe}" if recipe else ""
    within = "" if report.allocation is None else f" within {report.allocation.budget}"
    images = report.card.get("calibration_images", "an unknown number of")
    return f"{report.totals.parameters:,} parameters, quantized{by}{within} with {images} calibration images."


def _tiles(report: Report) -> list[dict[str, str]]:
    """The few numbers that one looks for first."""
    totals = report.totals
    bits = [
        ("-" if value is None else f"{value:.2f}") for value in (totals.mean_weight_bits, totals.mean_activation_bits)
    ]
    share = totals.bit_operations / totals.float_bit_operations if totals.float_bit_operations else 1.0
    found = [
        _tile("Model size", f"{totals.model_bytes / 1e6:.2f} MB", f"{totals.compression:.1f}x smaller than float32"),
        _tile("Mean bits", f"{bits[0]} / {bits[1]}", "weights / activations"),
        _tile("Bit operations", f"{totals.bit_operations / 1e9:.2f} G", f"{share:.1%} of float32"),
        _tile("Predicted loss", f"{totals.predicted_loss:.3g}", unit_of(report)),
    ]
    for name, label in (("accuracy", "Top-1 accuracy"), ("float_accuracy", "Top-1 in float32")):
        accuracy = report.card.get(name)
        if isinstance(accuracy, Mapping) and isinstance(accuracy.get("top1"), int | float):
            error, count = accuracy.get("standard_error"), accuracy.get("count")
            note = f"+/- {error:.2f}, {count:,} images" if type(error) is float and type(count) is int else ""
            found.append(_tile(label, f"{accuracy['top1']:.2f} %", note))
    return found


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _importance(importance: Mapping[str, float], layers: Sequence[LayerRow]) -> Table | None:
    """Importance as blocks by roles, in percent of all layers; None where there is none."""
    if not importance:
        return None
    rows = [row for row in layers if row.layer in importance]
    roles = list(dict.fromkeys(row.role for row in rows if row.block is not None))
    cells: dict[str, dict[str, float]] = {}
    for row in rows:
        line = row.layer if row.block is None else f"block {row.block}"
        role = "outside" if row.block is None else row.role
        cells.setdefault(line, {}).setdefault(role, 0.0)
        cells[line][role] += importance[row.layer]
    columns = [*roles, *(["outside"] if any("outside" in line for line in cells.values()) else [])]
    lines = tuple(
        (
            Cell(name),
            *(Cell(f"{100 * line[role]:.2f}" if role in line else "") for role in columns),
            Cell(f"{100 * sum(line.values()):.2f}"),
        )
        for name, line in cells.items()
    )
    return Table("Relevance, % of all layers", ("", *columns, "sum"), lines)
