"""A compiled model in a line, and as a small table for notebooks: what it is, its bits, its size, how it runs.

What the numbers mean: `fxquant.report.totals`. The whole report: `fxquant.report.tables`.
"""

from __future__ import annotations

from html import escape

from fxquant.report.tables import Report


def facts(report: Report) -> dict[str, str]:
    """What one wants to know first, by name, in reading order."""
    totals, allocation = report.totals, report.allocation
    found = {"model": str(report.card.get("model", "unknown"))}
    if allocation is not None:
        found["budget"] = str(allocation.budget)
    for name, bits in (("weight", totals.mean_weight_bits), ("activation", totals.mean_activation_bits)):
        if bits is not None:
            found[f"mean {name} bits"] = f"{bits:.3f}"
    found["size"] = f"{totals.model_bytes / 1e6:.3f} MB, {totals.compression:.2f} times smaller than float32"
    found["execution"] = str(report.card.get("execution", "simulated"))
    return found


def line_of(report: Report) -> str:
    """For `repr`."""
    first, *rest = facts(report).items()
    return f"fxquant.Compiled({first[1]}: {'; '.join(f'{name} {value}' for name, value in rest)})"


def html_of(report: Report) -> str:
    """For notebooks: a table, with names escaped, which are a stranger's words."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts(report).items())
    return f"<table>{rows}</table>"
