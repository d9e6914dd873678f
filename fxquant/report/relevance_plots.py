"""Pictures of relevance: importance by block and role, and where in an image a prediction comes from.

Need matplotlib, the extra `plots`; written in one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import GraphModule

from fxquant.errors import ArtefactError
from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.report.plots import check_plot, new_figure, write_figure


def plot_importance(path: str | PathLike[str], graph_module: GraphModule, importance: Mapping[str, float]) -> None:
    """Importance as one bar a block, stacked by role; layers outside blocks have bars of their own.

    Args:
        path: where the file is written.
        graph_module: where block and role of these layers stand.
        importance: by layer, sums to 1, as `Relevance.importance` gives it or ScoreLayers notes it.

    Raises MissingExtraError without matplotlib, ArtefactError where the file cannot be written or no layer of the graph
    has an importance.
    """
    check_plot(path)
    layers = [annotation_of(node) for node in nodes_with_role(graph_module)]
    layers = [layer for layer in layers if layer.layer in importance]
    if not layers:
        raise ArtefactError(f"{path}: no layer of this graph has an importance: it was measured on another")
    columns = list(dict.fromkeys(_column(layer.block, layer.layer) for layer in layers))
    roles = list(dict.fromkeys(str(layer.role) for layer in layers))
    height = np.zeros((len(roles), len(columns)))
    for layer in layers:
        height[roles.index(str(layer.role)), columns.index(_column(layer.block, layer.layer))] += importance[
            layer.layer
        ]
    figure = new_figure(figsize=(max(6.4, 0.5 * len(columns) + 2), 4.2), layout="constrained")
    axes = figure.add_subplot()
    bottom = np.cumsum(height, axis=0) - height
    for role, tops, bottoms in zip(roles, 100 * height, 100 * bottom, strict=True):
        axes.bar(range(len(columns)), tops, bottom=bottoms, label=role, width=0.8)
    axes.set_xticks(range(len(columns)), [name.replace(".", ".\n") for name in columns], fontsize="small")
    axes.set_ylim(0, 105 * height.sum(0).max())
    axes.set_xlabel("block, or layer outside blocks")
    axes.set_ylabel("importance, % of all layers")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, ncols=2, fontsize="small")
    write_figure(path, figure)


def _column(block: int | None, layer: str) -> str:
    return layer if block is None else str(block)


def plot_relevance(path: str | PathLike[str], images_bchw: Tensor, relevance_bchw: Tensor, titles: list[str]) -> None:
    """Images above their relevance: red speaks for the predicted class, blue against it; one column an image.

    Args:
        path: where the file is written.
        images_bchw: float (B, 1 or 3, H, W), any range.
        relevance_bchw: float (B, C, h, w), of the patch embedding's output or of the image; summed over channels, h and
            w divide H and W or not.
        titles: the text above each image.

    Raises as `plot_importance`.
    """
    check_plot(path)
    count = len(images_bchw)
    figure = new_figure(figsize=(1.7 * count, 3.7), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for column in range(count):
        image = images_bchw[column].permute(1, 2, 0).double().cpu().numpy()
        low, high = image.min(), image.max()
        grey = ((image - low) / max(high - low, 1e-12)).squeeze()
        relevance = relevance_bchw[column].sum(0).double().cpu().numpy()
        limit = max(float(np.quantile(np.abs(relevance), 0.99)), 1e-12)
        extent = (0, image.shape[1], image.shape[0], 0)
        axes[0, column].imshow(grey, cmap="gray", extent=extent)
        axes[1, column].imshow(grey.mean(-1) if grey.ndim == 3 else grey, cmap="gray", extent=extent)
        overlay: dict[str, Any] = {"cmap": "bwr", "vmin": -limit, "vmax": limit, "alpha": 0.6, "extent": extent}
        axes[1, column].imshow(relevance, interpolation="bilinear", **overlay)
        axes[0, column].set_title(titles[column], fontsize="small")
        for row in range(2):
            axes[row, column].set_axis_off()
    write_figure(path, figure)
