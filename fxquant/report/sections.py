"""The report's pieces as data: titled lines and tables of cells, which a terminal or plain text then renders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allocators.allocation import Allocation
from fxquant.graph.annotation import input_label
from fxquant.report.actions import Action
from fxquant.report.grid import Tile, grid_of, tiles_of
from fxquant.report.totals import Totals
from fxquant.runtime.layer_row import LayerRow
from fxquant.runtime.mac_shares import checked_shares
from passes.lower.rewrite import MISSES, reported_misses
from passes.pipeline.journal import Journal

EXECUTION = {"simulated": "simulated: right values in float arithmetic; loaded with a backend, it runs as integers"}


@dataclass(frozen=True)
class Cell:
    """A text; `bits` colours it."""

    text: str
    bits: int | None = None


@dataclass(frozen=True)
class Table:
    """Cells in columns; `left` are the indices of columns aligned left.

    Args:
        title: the text above the table.
        columns: the headings of the columns.
        rows: the cells, row by row.
        left: indices of the columns that are aligned left.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Lines:
    """A title over lines of text, each optionally with a label in front."""

    title: str
    lines: tuple[tuple[str, str], ...]


def header(model: str, allocation: Allocation | None, card: Mapping[str, Any]) -> Lines:
    """What was compiled, how, within which budget, and how it executes.

    Args:
        model: the model's name.
        allocation: the bits and how they were found; None for pipelines that allocate nothing.
        card: the protocol card of the compiled model.
    """
    lines = [("model", model), ("recipe", _recipe(card)), *_budget_lines(allocation)]
    if card.get("weights") == "random":
        lines.insert(1, ("weights", "RANDOM: not trained, accuracy means nothing"))
    execution = str(card.get("execution", "simulated"))
    lines.append(("execution", EXECUTION.get(execution, execution)))
    lines += [("arithmetic", text) for text in _arithmetic(card)]
    if "backend" in card:
        lines.append(("made for", str(card["backend"])))
    return Lines("fxquant report", tuple(lines))


def _arithmetic(card: Mapping[str, Any]) -> list[str]:
    """How the multiply-accumulates run, one line; none for a card that does not say."""
    shares = checked_shares(card.get("multiply_accumulates"))
    if not shares:
        return []
    parts = [
        f"{shares[key]:.1%} {how}"
        for key, how in (
            ("integer_share", "as integers"),
            ("simulated_share", "simulated"),
            ("float_share", "in float"),
        )
        if key in shares
    ]
    if "integer_share" not in shares:
        parts = [f"{1 - shares['float_share']:.1%} quantized", *parts]
    largest = ", ".join(f"{entry['node']} {entry['share']:.1%}" for entry in shares["largest_in_float"][:3])
    return [f"{', '.join(parts)} of {shares['total']:,} multiply-accumulates" + (f" ({largest})" if largest else "")]


def _recipe(card: Mapping[str, Any]) -> str:
    steps = " > ".join(step_name(step) for step in card.get("pipeline") or ())
    name = card.get("recipe")
    return f"{name}: {steps}" if name else steps or "unknown"


def _budget_lines(allocation: Allocation | None) -> list[tuple[str, str]]:
    if allocation is None:
        return [("budget", "none: bits were not allocated")]
    used = "; ".join(
        f"{name.replace('_', ' ')} {_quantity(allocation.usage[name])} of {_quantity(limit)}"
        for name, limit in allocation.budget.limits.items()
    )
    gap = "no bound known" if allocation.gap is None else f"gap {allocation.gap:.2%}"
    binding = ", ".join(name.replace("_", " ") for name in allocation.binding) or "none"
    status = f"{allocation.status}, found by {allocation.solver}; {gap}; binding: {binding}"
    return [("budget", f"{allocation.budget} ({used})"), ("allocation", status)]


def totals(found: Totals) -> Table:
    """Sizes and operations beside float32 and W8A8."""
    kept = 4 * (found.parameters - found.quantized_parameters)
    int8_bytes = found.quantized_parameters + kept
    rows = [
        _total("model MB", found.float_bytes, int8_bytes, found.model_bytes, _mega),
        _total("  quantized weights MB", 4 * found.quantized_parameters, found.quantized_parameters,
               found.weight_bytes, _mega),
        _total("  float rest MB", kept, kept, kept, _mega),
        _total("mean weight bits", 32, 8, found.mean_weight_bits, _bits),
        _total("mean activation bits", 32, 8, found.mean_activation_bits, _bits),
        _total("bit operations G", found.float_bit_operations, found.int8_bit_operations, found.bit_operations, _giga),
    ]  # fmt: skip
    factors = (found.compression, 1.0, found.float_bytes / int8_bytes if int8_bytes else 1.0)
    compression = [Cell(f"{factor:.2f}x") for factor in factors]
    rows.insert(1, (Cell("  compression"), *compression, Cell(""), Cell("")))
    return Table("Totals", ("", "this model", "float32", "W8A8", "of float32", "of W8A8"), tuple(rows))


def _total(
    name: str, float32: float, int8: float, value: float | None, write: Callable[[float], str]
) -> tuple[Cell, ...]:
    if value is None:
        return (Cell(name), Cell("-"), Cell(write(float32)), Cell(write(int8)), Cell("-"), Cell("-"))
    shares = [f"{value / whole:.1%}" if whole else "-" for whole in (float32, int8)]
    return (Cell(name), Cell(write(value)), Cell(write(float32)), Cell(write(int8)), *map(Cell, shares))


def grid(layers: Sequence[LayerRow]) -> Table:
    """Blocks by roles, cells `weight/activation` bits; layers outside blocks have rows and a column of their own."""
    found = grid_of(tiles_of(layers))
    rows = [
        (Cell(f"block {block}"), *(_grid_cell(found.at(block, role)) for role in found.roles), Cell(""))
        for block in found.blocks
    ]
    outside = [(Cell(tile.layer), *[Cell("")] * len(found.roles), _grid_cell([tile])) for tile in found.outside]
    return Table("Bits (weight/activation)", ("", *found.roles, "outside blocks"), (*rows, *outside))


def _grid_cell(tiles: Sequence[Tile]) -> Cell:
    if not tiles:
        return Cell("")
    first = tiles[0]
    return Cell(" ".join(tile.label for tile in tiles), first.shade[0] or first.shade[1])


def layer_table(layers: Sequence[LayerRow], found: Totals) -> Table:
    """One line per quantized layer."""
    columns = (
        "layer", "role", "W bits", "A bits", "W SQNR dB", "A SQNR dB", "predicted loss", "share",
        "of bytes", "pinned", "quantizers W, A", "execution",
    )  # fmt: skip
    rows = tuple(
        (
            Cell(row.layer),
            Cell(row.role),
            Cell(_or_dash(row.weight_bits), row.weight_bits),
            Cell(input_label(row.input_bits), row.activation_bits),
            Cell(_or_dash(row.weight and row.weight.sqnr_db, ".1f")),
            Cell(_or_dash(row.input_sqnr_db, ".1f")),
            Cell(f"{row.predicted_loss:.2e}"),
            Cell(share(row.predicted_loss, found.predicted_loss)),
            Cell("-" if row.weight_bits is None else share(row.weight_bytes, found.weight_bytes)),
            Cell("pinned" if row.pinned else ""),
            Cell(f"{_or_dash(row.weight and row.weight.quantizer)}, {_or_dash(row.input_quantizers)}"),
            Cell(row.execution),
        )
        for row in layers
    )
    return Table("Layers", columns, rows, frozenset({0, 1, 9, 10, 11}))


def actions(found: Sequence[Action]) -> Lines:
    """What to paste to give the most harmful layers more bits."""
    if not found:
        return Lines("What to do", (("", "nothing: no layer with a predicted loss can be raised"),))
    lines = [("", "Layers with the largest predicted loss, raised by two bits; within the same budget others pay:")]
    for action in found:
        cost = f"+{action.extra_bytes / 1e3:.1f} KB, +{action.extra_bit_operations / 1e9:.3f} G bit operations"
        lines.append(("", f"{action.layer}: {action.loss_share:.1%} of the predicted loss; raising it costs {cost}"))
        lines.append(("", f"    {action.python}"))
        lines.append(("", f"    {action.command}"))
    return Lines("What to do", tuple(lines))


def misses(journal: Journal) -> Lines | None:
    """What a backend does not run as integers, or not in one kernel, and why; None where there is nothing to say."""
    found = next((reported_misses(entry.notes) for entry in reversed(journal.entries) if MISSES in entry.notes), {})
    lines = []
    for (outcome, reason), layers in found.items():
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        lines.append((outcome, f"{', '.join(layers[:3])}{more}: {reason}"))
    return Lines("What could run faster", tuple(lines)) if lines else None


def protocol(card: Mapping[str, Any]) -> Lines:
    """How the numbers came about."""
    ends = card.get("first_last_weight_bits") or {}
    policy = "; ".join(f"{role} W{'/W'.join(map(str, bits))}" for role, bits in ends.items() if bits)
    images = card.get("calibration_images", "?")
    labels = "labels used" if card.get("labels_used") else "no labels used"
    versions = ", ".join(f"{name} {version}" for name, version in (card.get("versions") or {}).items())
    lines = [
        ("calibration", f"{card.get('calibration') or f'{images} images'}, {labels}"),
        ("seed", str(card.get("seed", "?"))),
        ("first, last", policy or "no such layers"),
        ("stays float", ", ".join(card.get("stays_float") or ()) or "nothing"),
        ("versions", versions or "unknown"),
    ]
    if preprocessing := card.get("preprocessing"):
        lines.insert(1, ("preprocessing", ", ".join(f"{key} {value}" for key, value in preprocessing.items())))
    if objective := card.get("objective"):
        lines.insert(1, ("objective", f"{objective.get('name', '?')}, in {objective.get('unit', '?')}"))
    if latency := card.get("latency"):
        lines.append(("latency of", str(latency)))
    return Lines("Protocol", tuple(lines))


def journal_table(journal: Journal) -> Table:
    """One line per pass."""
    rows = tuple(
        (Cell(step_name(e.step)), Cell(str(e.nodes_changed)), Cell(f"{e.seconds:.2f}"), Cell(f"{e.peak_mib:.0f}"))
        for e in journal.entries
    )
    return Table("Journal", ("pass", "nodes changed", "seconds", "peak MiB"), rows)


def step_name(step: str) -> str:
    """The pass's name out of its repr: `FoldSqb(eps=...)` gives `FoldSqb`."""
    return step.partition("(")[0]


def share(part: float, whole: float) -> str:
    """A percentage, `-` of nothing."""
    return f"{part / whole:.1%}" if whole else "-"


def _or_dash(value: Any, spec: str = "") -> str:
    return "-" if value is None else format(value, spec)


def _mega(value: float) -> str:
    return f"{value / 1e6:.3f}"


def _giga(value: float) -> str:
    return f"{value / 1e9:.3f}"


def _bits(value: float) -> str:
    return f"{value:.3f}"


def _quantity(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"
