"""Plots that need matplotlib, the extra `plots`."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from os import PathLike
from pathlib import Path
from typing import Any

from fxquant.artefact.container import write_file
from fxquant.errors import ArtefactError, MissingExtraError

_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class PlotPoint:
    """One compiled model: its line, its mean bits over weights and activations, its top-1 (%) and standard error.

    Args:
        line: the name of the line that the point belongs to.
        mean_bits: the mean width over weights and activations.
        top1: the accuracy in percent.
        standard_error: the standard error of the accuracy, in percentage points.
    """

    line: str
    mean_bits: float
    top1: float
    standard_error: float = 0.0


def check_plot(path: str | PathLike[str]) -> None:
    """Fail early: raises MissingExtraError without matplotlib, ArtefactError for a suffix it is not asked to write."""
    _pyplot_free_figure()
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise ArtefactError(f"{path}: a plot ends in one of {', '.join(_SUFFIXES)}")


def plot_accuracy(path: str | PathLike[str], points: Sequence[PlotPoint], float_top1: float | None = None) -> None:
    """Accuracy over mean bits, one line per `PlotPoint.line`, float32 as a dashed line; written in one step.

    Args:
        path: where the file is written.
        points: compiled models.
        float_top1: of the float model, in percent; None: not shown.

    Raises MissingExtraError without matplotlib, ArtefactError where the file cannot be written.
    """
    check_plot(path)
    figure = new_figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for marker, line in zip(cycle("os^Dvph*"), dict.fromkeys(point.line for point in points), strict=False):
        found = sorted((point for point in points if point.line == line), key=lambda point: point.mean_bits)
        bits, top1 = [point.mean_bits for point in found], [point.top1 for point in found]
        axes.errorbar(
            bits, top1, [point.standard_error for point in found], marker=marker, markersize=5, capsize=2, label=line
        )
    if float_top1 is not None:
        axes.axhline(float_top1, color="0.3", linestyle="--", linewidth=1, label=f"float32, {float_top1:.1f} %")
    axes.set_xlabel("mean bits (weights and activations)")
    axes.set_ylabel("top-1 accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    write_figure(path, figure)


def plot_sensitivity(
    path: str | PathLike[str], panels: Mapping[str, Mapping[str, float]], role_of: Mapping[str, str]
) -> None:
    """Scores of layers along the blocks, one line a role, one panel a metric (LampQ, Figure 5); logarithmic.

    Args:
        path: where the file is written.
        panels: by title, the score of each layer in graph order; scores of one panel share a unit.
        role_of: the role of each layer, by the layer's name.

    Raises MissingExtraError without matplotlib, ArtefactError where the file cannot be written or nothing is above 0.
    """
    check_plot(path)
    if not panels or not all(max(scores.values(), default=0) > 0 for scores in panels.values()):
        raise ArtefactError(f"{path}: every panel of a sensitivity plot needs a score above zero")
    figure = new_figure(figsize=(4.2 * len(panels) + 0.8, 3.6), layout="constrained")
    for index, (title, scores) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for marker, role in zip(cycle("os^D"), dict.fromkeys(role_of[layer] for layer in scores), strict=False):
            found = [score for layer, score in scores.items() if role_of[layer] == role]
            shown = [score if score > 0 else math.nan for score in found]
            axes.plot(range(len(found)), shown, marker=marker, markersize=4.5, linewidth=1.2, label=role)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if not index:
            axes.set_ylabel("score")
            lines, labels = axes.get_legend_handles_labels()
            figure.legend(lines, labels, loc="outside right upper", frameon=False, fontsize=9)
    write_figure(path, figure)


def new_figure(**options: Any) -> Any:
    """An empty matplotlib figure that needs no display; raises MissingExtraError without matplotlib."""
    return _pyplot_free_figure()(**options)


def write_figure(path: str | PathLike[str], figure: Any) -> None:
    """Write a figure in one step, in the format of the suffix; raises ArtefactError where it cannot be written."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:].lower(), dpi=150)
    write_file(Path(path), content.getvalue())


def plot_frontier(
    path: str | PathLike[str], axis: str, limits: Sequence[float], losses: Mapping[str, Sequence[float]]
) -> None:
    """Losses by name over budgets, on a logarithmic scale where all are positive; written in one step.

    Args:
        path: where the file is written.
        axis: what the budget limits.
        limits: the budgets, ascending.
        losses: for each curve, by its name, the losses at the budgets.

    Raises MissingExtraError without matplotlib, ArtefactError where the file cannot be written.
    """
    check_plot(path)
    figure = new_figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for marker, (name, values) in zip(cycle("os^D"), losses.items(), strict=False):
        axes.plot(limits, values, marker=marker, markersize=4, label=name)
    if all(value > 0 for values in losses.values() for value in values):
        axes.set_yscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    write_figure(path, figure)


def plot_latency(path: str | PathLike[str], timings: Sequence[tuple[str, int, float]]) -> None:
    """Throughput as bars: (variant, batch size, images per second), grouped by batch size; written in one step.

    Raises MissingExtraError without matplotlib, ArtefactError where the file cannot be written.
    """
    check_plot(path)
    figure = new_figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    variants = list(dict.fromkeys(variant for variant, _, _ in timings))
    sizes = list(dict.fromkeys(size for _, size, _ in timings))
    for index, variant in enumerate(variants):
        found = {size: speed for name, size, speed in timings if name == variant}
        places = [sizes.index(size) + (index - (len(variants) - 1) / 2) * 0.8 / len(variants) for size in found]
        bars = axes.bar(places, list(found.values()), 0.8 / len(variants), label=variant)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
    axes.set_ylabel("images per second")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    write_figure(path, figure)


def _pyplot_free_figure() -> Any:
    """matplotlib's Figure, without pyplot and its display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'fxquant[plots]'") from error
    return Figure
