"""Figures of what quantizers do to tensors, as papers on quantized Vision Transformers print them.

Need matplotlib, the extra `plots`; written in one step. Numbers come from `fxquant.session.tensor_figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from fxquant.errors import ArtefactError
from fxquant.report.plots import check_plot, new_figure, write_figure

Values = NDArray[np.float32]
_BINS = 120


def plot_histograms(path: str | PathLike[str], before: Values, after: Values, title: str) -> None:
    """Negative and positive values of a tensor before and after its quantizer, counts on a logarithmic axis.

    Args:
        path: of the file.
        before: float values, any shape.
        after: what the quantizer makes of them, same shape.
        title: above the figure.

    Raises MissingExtraError without matplotlib, ArtefactError where the file cannot be written.
    """
    check_plot(path)
    sides = [(name, mask) for name, mask in (("negative", before < 0), ("not negative", before >= 0)) if mask.any()]
    figure = new_figure(figsize=(4.6 * len(sides), 5.4), layout="constrained")
    axes = figure.subplots(2, len(sides), squeeze=False, sharex="col", sharey="col")
    for column, (name, mask) in enumerate(sides):
        ends = float(before[mask].min()), float(before[mask].max())
        for row, (when, values, colour) in enumerate((("before", before, "C0"), ("after", after, "C3"))):
            axes[row, column].hist(values[mask].ravel(), bins=_BINS, range=ends, color=colour)
            axes[row, column].set_yscale("log")
            axes[row, column].set_title(f"{name}, {when}", fontsize=10)
            axes[row, column].grid(alpha=0.3)
        axes[1, column].set_xlabel("value")
    for row in range(2):
        axes[row, 0].set_ylabel("count")
    figure.suptitle(title, fontsize=11)
    write_figure(path, figure)


def plot_boxes(
    path: str | PathLike[str], before: Mapping[str, Values], after: Mapping[str, Values], title: str
) -> None:
    """Box plots by layer, before and after the quantizer side by side; whiskers end at the 1st and 99th percentile.

    Args:
        path: of the file.
        before: by label, float values of any shape.
        after: under the same labels, what quantizers make of them; empty: they are not shown.
        title: above the figure.

    Dots are the least and the largest value. Raises as `plot_histograms`; ArtefactError without any values.
    """
    check_plot(path)
    if not before:
        raise ArtefactError(f"{path}: there is no tensor to draw boxes of")
    figure = new_figure(figsize=(max(6.4, 0.55 * len(before) + 1.5), 4.2), layout="constrained")
    axes = figure.add_subplot()
    groups = [("before", before, "C0"), *([("after", after, "C3")] if after else [])]
    for index, (name, values, colour) in enumerate(groups):
        places = np.arange(len(before)) + (index - (len(groups) - 1) / 2) * 0.36
        found = [values[label].ravel() for label in before]
        boxes = axes.boxplot(
            found, positions=places, widths=0.3, whis=(1, 99), showfliers=False, patch_artist=True,
            medianprops={"color": "0.1"},
        )  # fmt: skip
        for box in boxes["boxes"]:
            box.set(facecolor=colour, alpha=0.6)
        for extreme in (np.min, np.max):
            axes.plot(places, [extreme(values) for values in found], ".", color=colour, markersize=4)
        axes.plot([], [], color=colour, linewidth=6, alpha=0.6, label=name)
    axes.set_xticks(range(len(before)), list(before))
    axes.set_xlabel("block, or layer outside blocks")
    axes.set_ylabel("value")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=11)
    write_figure(path, figure)


def plot_mean_distances(path: str | PathLike[str], distances: Mapping[str, Sequence[float]], labels: list[str]) -> None:
    """How far the mean of one image lies from that of all, by layer, one line a rule (MPTQ-ViT, Figure 3).

    Args:
        path: of the file.
        distances: by rule, one a layer.
        labels: of the layers.

    Raises as `plot_histograms`.
    """
    check_plot(path)
    figure = new_figure(figsize=(max(6.4, 0.35 * len(labels) + 2), 4.2), layout="constrained")
    axes = figure.add_subplot()
    for marker, (name, values) in zip("os^D", distances.items(), strict=False):
        axes.plot(range(len(labels)), values, marker=marker, markersize=4.5, label=name)
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize="small")
    axes.set_ylabel("distance of an image's means")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    write_figure(path, figure)
